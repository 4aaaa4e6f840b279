"""Which latent frames of a training clip are given: clean, at time 0, and left out of the loss.

Open-Sora 1.2 trains one model for text, images, extension and interpolation by giving some clips some frames
(`diffusion.given`): a model that takes a time for each latent frame sees which by their time of 0.
"""

from collections.abc import Sequence

import numpy as np

from vidit.config import Given, GivenKind

# A frame in so many is the most that the kinds of a quarter give at one end.
QUARTER = 4


def given_frames(kinds: Sequence[Given], num_frames: int, generator: np.random.Generator) -> list[bool]:
    """Of one clip: whether each of its latent frames is given. Of a single frame, and of all of them, none is."""
    u = generator.random()
    for given in kinds:
        if num_frames > 1 and u < given.share:
            chosen = _frames(given.kind, num_frames, generator)
            return [frame in chosen for frame in range(num_frames)]
        u -= given.share
    return [False] * num_frames


def _frames(kind: GivenKind, num_frames: int, generator: np.random.Generator) -> set[int]:
    """Fewer than all of them."""
    if kind == "random":
        keep = generator.uniform(0.1, 0.9)
        chosen = {frame for frame in range(num_frames) if generator.random() < keep}
        return chosen - {int(generator.integers(num_frames))} if len(chosen) == num_frames else chosen
    if kind == "interpolate":
        return set(range(int(generator.integers(2)), num_frames, 2))
    count, place = 1, kind.removeprefix("image_")
    if kind.startswith("quarter"):
        count, place = int(generator.integers(1, max(1, num_frames // QUARTER) + 1)), kind.removeprefix("quarter_")
    head, tail = set(range(count)), set(range(num_frames - count, num_frames))
    if place == "random":
        start = int(generator.integers(num_frames - count + 1))
        return set(range(start, start + count))
    both = head | tail
    chosen = {"head": head, "tail": tail, "head_tail": both}[place]
    return chosen if len(chosen) < num_frames else head
