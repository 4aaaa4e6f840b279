"""A procedural dataset of captioned scenes: coloured shapes that move over a quiet background.

Why: a text-to-video model needs clips whose captions are exactly true and whose content can be marked by
image analysis, so that "the text was obeyed" is a number and not a picture.

Contract: a scene is a value. `sample_scene` is a pure function of its arguments, `render` turns the value
into pixels, `caption` into text, and `vidit.evaluate.scene_score.score_scene` reads pixels back. The pairs in
`HELD_OUT` never occur in the train split: a model that draws them has understood colour and shape as two
things and not as a table of examples.
"""

from collections.abc import Sequence

import numpy as np

from vidit.data.scene_captions import caption
from vidit.data.scene_layout import place_things
from vidit.data.scene_render import render
from vidit.data.scene_types import (
    COLOURS,
    DIRECTIONS,
    HELD_OUT,
    MOTIONS,
    SHAPES,
    TEXTURES,
    Background,
    Pose,
    Scene,
    Split,
    Thing,
    keyed_generator,
)

__all__ = [
    "COLOURS",
    "COUNT_ODDS",
    "DIRECTIONS",
    "HELD_OUT",
    "MOTIONS",
    "SHAPES",
    "TEXTURES",
    "Background",
    "Pose",
    "Scene",
    "Split",
    "Thing",
    "caption",
    "keyed_generator",
    "render",
    "sample_scene",
]


# Odds of one, two and three things: most scenes are simple, as most captions of videos are.
COUNT_ODDS = (0.7, 0.22, 0.08)


def sample_scene(
    seed: int,
    index: int,
    split: Split,
    num_frames: int = 9,
    height: int = 64,
    width: int = 64,
    fps: int = 8,
    count_odds: Sequence[float] = COUNT_ODDS,
) -> Scene:
    """Scene number `index` of a split: a pure function of its arguments.

    `count_odds` are the (unnormalised) odds of one, two and three things. In the held-out split every
    scene has a held-out pair. Raises ValueError for arguments that describe no scene.
    """
    _check(split, num_frames, height, width, count_odds)
    rng = keyed_generator("scene", seed, index, split)
    weights = np.asarray(count_odds, dtype=float)
    count = 1 + int(rng.choice(len(weights), p=weights / weights.sum()))
    looks = _sample_looks(rng, count, split)
    motions = _sample_motions(rng, looks, num_frames)
    things = place_things(rng, looks, motions, num_frames, height, width)
    background = _sample_background(rng, height, width)
    return Scene(things, background, num_frames, height, width, fps, int(rng.integers(2**53)))


def _check(split: str, num_frames: int, height: int, width: int, count_odds: Sequence[float]) -> None:
    if split not in ("train", "held_out"):
        raise ValueError(f"split is {split!r}; use 'train' or 'held_out'")
    if num_frames < 1 or min(height, width) < 32:
        raise ValueError(f"{num_frames} frames of {height}x{width}: a scene needs at least 1 frame and 32x32 pixels")
    if not 1 <= len(count_odds) <= 3 or min(count_odds) < 0 or sum(count_odds) <= 0:
        raise ValueError(f"count_odds={tuple(count_odds)}: give 1 to 3 odds, none negative, not all 0")


def _sample_looks(rng: np.random.Generator, count: int, split: Split) -> list[tuple[str, str]]:
    """(colour, shape) of each thing: colours distinct, held-out pairs only where the split has them."""
    colours = [list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:count]]
    allowed = {
        colour: [shape for shape in SHAPES if split == "held_out" or (colour, shape) not in HELD_OUT]
        for colour in colours
    }
    if split == "held_out":
        chosen = colours[int(rng.integers(count))]
        allowed[chosen] = [shape for shape in SHAPES if (chosen, shape) in HELD_OUT]
    return [(colour, str(rng.choice(allowed[colour]))) for colour in colours]


def _sample_motions(rng: np.random.Generator, looks: list[tuple[str, str]], num_frames: int) -> list[str]:
    """A motion for each thing; where two collide they are the first two."""
    motions = []
    for _, shape in looks:
        # A circle that turns cannot be told from one that rests.
        choices = [m for m in MOTIONS if m != "collide" and (m, shape) != ("turn", "circle")]
        odds = np.array([0.17 if m in DIRECTIONS else 0.11 for m in choices])
        motions.append(str(rng.choice(choices, p=odds / odds.sum())))
    # A collision needs a frame before and a frame after the contact.
    if len(looks) > 1 and num_frames >= 3 and rng.random() < 0.3:
        motions[:2] = ["collide", "collide"]
    return motions


def _sample_background(rng: np.random.Generator, height: int, width: int) -> Background:
    """Two greys 8 to 24 levels apart with a common tint of at most 14 levels; half of the textures drift."""
    texture = str(rng.choice(TEXTURES))
    contrast = rng.uniform(8, 24)
    level = rng.uniform(35, 225 - contrast)
    tint = rng.uniform(-7, 7, size=3)
    short = min(height, width)
    drift = rng.uniform(-0.12, 0.12, size=2) * short * (rng.random() < 0.5)
    return Background(
        texture=texture,
        dark=_grey(level + tint),
        light=_grey(level + contrast + tint),
        period=float(rng.uniform(0.14, 0.26) * short),
        angle=float(rng.uniform(0, 2 * np.pi)),
        drift=(float(drift[0]), float(drift[1])),
    )


def _grey(levels: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (round(float(level)) for level in np.clip(levels, 0, 255))
    return red, green, blue
