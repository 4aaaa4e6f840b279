"""The scenes are pure, true to their rules and told in full."""

import math

import numpy as np
import pytest

from vidit.data.scene_render import coverage
from vidit.data.scenes import (
    COLOURS,
    DIRECTIONS,
    HELD_OUT,
    MOTIONS,
    SHAPES,
    TEXTURES,
    Scene,
    Split,
    caption,
    render,
    sample_scene,
)

SPLITS: tuple[Split, ...] = ("train", "held_out")
CROWDED = (0.2, 0.4, 0.4)
GOLDEN_THING = ("cyan", "triangle", "up", 2628088635762906)
GOLDEN_CAPTION = "We see a cyan triangle that slides to the top."
STEMS = {
    "left": ("left",),
    "right": ("right",),
    "up": (" up", " top"),
    "down": (" down", " bottom"),
    "grow": ("grow", "bigger", "expand"),
    "shrink": ("shrink", "smaller", "contract"),
    "turn": ("spin", "turn", "rotat"),
    "collide": ("bounce",),
}


def scenes(number: int, **sizes: int) -> list[Scene]:
    return [sample_scene(3, i, SPLITS[i % 2], count_odds=CROWDED, **sizes) for i in range(number)]


def test_the_same_arguments_give_the_same_scene_and_others_another() -> None:
    scene = sample_scene(1, 5, "train")
    again = sample_scene(1, 5, "train")
    assert scene == again
    assert caption(scene) == caption(again)
    assert np.array_equal(render(scene), render(again))
    others = [sample_scene(2, 5, "train"), sample_scene(1, 6, "train"), sample_scene(1, 5, "held_out")]
    assert all(other != scene and other.seed != scene.seed for other in others)


def test_golden_scene_does_not_change_between_machines() -> None:
    """Data sets are named by their seed, so the numbers behind a seed are part of the interface."""
    scene = sample_scene(0, 0, "train")
    thing = scene.things[0]
    assert (thing.colour, thing.shape, thing.motion, scene.seed) == GOLDEN_THING
    assert caption(scene) == GOLDEN_CAPTION


def test_held_out_pairs_are_one_of_each_colour_and_every_shape() -> None:
    assert sorted(colour for colour, _ in HELD_OUT) == sorted(COLOURS)
    assert {shape for _, shape in HELD_OUT} == set(SHAPES)


def test_held_out_pairs_stay_out_of_train_and_are_in_every_held_out_scene() -> None:
    for index in range(300):
        train = sample_scene(4, index, "train", count_odds=CROWDED)
        assert not {(thing.colour, thing.shape) for thing in train.things} & set(HELD_OUT)
        held_out = sample_scene(4, index, "held_out", count_odds=CROWDED)
        assert {(thing.colour, thing.shape) for thing in held_out.things} & set(HELD_OUT)


def test_every_word_of_the_vocabulary_occurs() -> None:
    many = scenes(500)
    things = [thing for scene in many for thing in scene.things]
    assert {len(scene.things) for scene in many} == {1, 2, 3}
    assert {(thing.colour, thing.shape) for thing in things} == {(c, s) for c in COLOURS for s in SHAPES}
    assert {thing.motion for thing in things} == set(MOTIONS)
    assert {thing.direction for thing in things} == {*DIRECTIONS, None}
    assert {scene.background.texture for scene in many} == set(TEXTURES)
    assert all(len({thing.colour for thing in scene.things}) == len(scene.things) for scene in many)


@pytest.mark.parametrize(("num_frames", "height", "width"), [(9, 64, 64), (17, 48, 80), (1, 32, 32)])
def test_things_stay_inside_the_frame_and_apart(num_frames: int, height: int, width: int) -> None:
    for scene in scenes(150, num_frames=num_frames, height=height, width=width):
        poses = np.stack([thing.at(scene.times) for thing in scene.things])
        x, y, radius = poses[..., 0], poses[..., 1], poses[..., 2]
        assert np.all((x > radius) & (x < width - radius) & (y > radius) & (y < height - radius))
        for a in range(len(poses)):
            for b in range(a):
                gap = np.hypot(x[a] - x[b], y[a] - y[b]) - radius[a] - radius[b]
                assert scene.things[a].motion == scene.things[b].motion == "collide" or np.all(gap > 0)


def test_motions_do_what_they_are_called() -> None:
    for scene in scenes(300):
        for thing in scene.things:
            first, last = thing.at(np.array([0.0, 1.0]))
            step = (last - first)[:2] / (scene.width, scene.height)
            if thing.motion in ("left", "right", "up", "down"):
                axis, sign = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}[thing.motion]
                assert sign * step[axis] >= 0.35
                assert step[1 - axis] == 0
            elif thing.motion != "collide":
                assert np.allclose(step, 0)
            assert (last[2] > 1.5 * first[2]) == (thing.motion == "grow")
            assert (first[2] > 1.5 * last[2]) == (thing.motion == "shrink")
            assert (abs(last[3] - first[3]) > 0.5) == (thing.motion == "turn")


def test_two_that_collide_touch_at_one_frame_without_overlap() -> None:
    pairs = [scene for scene in scenes(200) if scene.things[0].motion == "collide"]
    assert len(pairs) > 20
    for scene in pairs:
        a, b = (thing.at(scene.times)[:, :2] for thing in scene.things[:2])
        gap = np.abs(a - b).max(axis=1)
        contact = int(gap.argmin())
        assert 0 < contact < scene.num_frames - 1
        assert np.all(np.diff(gap[: contact + 1]) < 0)
        assert np.all(np.diff(gap[contact:]) > 0)
        radii = [thing.poses[0].radius for thing in scene.things[:2]]
        assert 0.5 * sum(radii) < gap[contact] <= sum(radii) + 1e-6


def test_render_has_the_promised_form_and_paints_what_is_there() -> None:
    for scene in scenes(60, num_frames=5, height=48, width=80):
        video = render(scene)
        assert video.shape == (5, 48, 80, 3)
        assert video.dtype == np.uint8
        for thing in scene.things:
            for frame, (x, y, _, _) in zip(video, thing.at(scene.times), strict=True):
                assert np.abs(frame[int(y), int(x)].astype(int) - COLOURS[thing.colour]).max() <= 1


@pytest.mark.parametrize(("shape", "area"), [("circle", math.pi), ("square", 2.0), ("triangle", 0.75 * math.sqrt(3))])
def test_a_drawn_shape_has_the_area_of_its_formula(shape: str, area: float) -> None:
    axis = np.arange(-60, 61)
    drawn = coverage(shape, axis[None, :], axis[:, None], 50.0, 0.3).sum()
    assert drawn == pytest.approx(area * 50**2, rel=0.005)


def test_captions_name_every_attribute_and_vary() -> None:
    many = scenes(400)
    for scene in many:
        text = caption(scene)
        assert text.endswith(".")
        assert text[0].isupper()
        assert "  " not in text
        for thing in scene.things:
            assert f"a {thing.colour} {thing.shape}" in text.lower()
            assert any(stem in text for stem in STEMS[thing.motion]), text
        assert ("background" in text) == (f"a {scene.background.texture} background" in text)
    single = [scene for scene in many if len(scene.things) == 1]
    assert len({caption(scene).split(scene.things[0].colour)[0] for scene in single}) >= 6
    assert 0.2 < np.mean(["background" in caption(scene) for scene in many]) < 0.6


def test_arguments_that_describe_no_scene_are_refused() -> None:
    with pytest.raises(ValueError, match="split is 'test'"):
        sample_scene(0, 0, "test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 frames"):
        sample_scene(0, 0, "train", num_frames=0)
    with pytest.raises(ValueError, match="16x64"):
        sample_scene(0, 0, "train", height=16)
    with pytest.raises(ValueError, match="count_odds"):
        sample_scene(0, 0, "train", count_odds=(0, 0, 0, 1))
