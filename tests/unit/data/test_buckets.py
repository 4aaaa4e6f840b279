"""Which bucket a clip goes to, and how many rows of each a micro-batch holds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidit.batching import micro_batch_rows, row_cost
from vidit.config import Bucket, ConfigError, RunConfig
from vidit.data.buckets import Facts, assign, schedule_of
from vidit.data.texts import Texts
from vidit.resolve import resolve

Configure = Callable[..., RunConfig]
SHAPES = tuple(
    Bucket(num_frames=t, height=h, width=w)
    for t in (1, 17, 33)
    for h, w in ((64, 64), (128, 128), (96, 176), (176, 96))
)
NAMES = [(b.num_frames, b.height, b.width) for b in SHAPES]


def facts(*clips: tuple[int, int, int]) -> Facts:
    frames, height, width = (np.array(column) for column in zip(*clips, strict=True))
    return Facts(Texts.of([f"clip-{i}" for i in range(len(clips))]), frames, width, height)


@pytest.mark.parametrize(
    ("clip", "bucket"),
    [
        ((33, 128, 128), (33, 128, 128)),
        ((40, 500, 500), (33, 128, 128)),
        ((32, 128, 128), (17, 128, 128)),
        ((17, 127, 128), (17, 64, 64)),  # the larger one would enlarge it
        ((200, 1080, 1920), (33, 96, 176)),
        ((200, 1920, 1080), (33, 176, 96)),
        ((1, 512, 512), (1, 128, 128)),
        ((20, 32, 32), (17, 64, 64)),  # smaller than all: enlarged as little as can be
    ],
)
def test_the_nearest_that_it_fills(clip: tuple[int, int, int], bucket: tuple[int, int, int]) -> None:
    assert NAMES[int(assign(facts(clip), SHAPES, 0)[0])] == bucket


def test_too_short_for_all() -> None:
    assert assign(facts((4, 64, 64), (5, 64, 64)), SHAPES[4:], 0).tolist() == [-1, -1]


def test_the_longest_may_come_before_the_largest() -> None:
    shapes = tuple(Bucket(num_frames=t, height=s, width=s) for t, s in ((5, 64), (17, 32), (17, 16)))
    clips = facts((20, 64, 64), (9, 64, 64))
    assert assign(clips, shapes, 0).tolist() == [0, 0]
    assert assign(clips, shapes, 0, longest_first=True).tolist() == [1, 0]


def test_the_longest_may_come_before_the_nearest_in_aspect() -> None:
    shapes = tuple(Bucket(num_frames=t, height=h, width=w) for t, h, w in ((5, 96, 48), (17, 64, 48), (17, 64, 64)))
    clips = facts((20, 128, 64), (9, 128, 64))
    assert assign(clips, shapes, 0).tolist() == [0, 0]
    assert assign(clips, shapes, 0, longest_first=True).tolist() == [1, 0]


def test_keep_hands_clips_down() -> None:
    shapes = tuple(s.model_copy(update={"keep": 0.25 if s.num_frames == 33 else 0.5}) for s in SHAPES)
    clips = facts(*[(33, 128, 128)] * 4000)
    found = assign(clips, shapes, 0)
    share = {NAMES[i]: float((found == i).mean()) for i in set(found.tolist())}
    assert share[33, 128, 128] == pytest.approx(0.25, abs=0.03)
    assert share[17, 128, 128] == pytest.approx(0.375, abs=0.03)
    assert (found >= 0).all(), "the last bucket takes what is left"
    assert np.array_equal(found, assign(clips, shapes, 0)), "keyed by the clip"
    assert not np.array_equal(found, assign(clips, shapes, 1))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 100), st.integers(16, 2000), st.integers(16, 2000)), min_size=1, max_size=30))
def test_a_clip_fills_its_bucket(clips: list[tuple[int, int, int]]) -> None:
    """In frames always; in pixels wherever some bucket of its length is small enough."""
    found = assign(facts(*clips), SHAPES, 3)
    alone = [int(assign(facts(clip), SHAPES, 3)[0]) for clip in clips]
    assert found.tolist() == alone, "no clip's bucket depends on the others"
    for (frames, height, width), i in zip(clips, found.tolist(), strict=True):
        bucket = SHAPES[i]
        assert bucket.num_frames <= frames
        if height >= 64 and width >= 64:
            assert bucket.height <= height
            assert bucket.width <= width


def test_rows_cost_about_the_same(configure: Configure) -> None:
    shapes = [{"num_frames": t, "height": s, "width": s} for t in (1, 3, 5) for s in (16, 32)]
    config = configure(data={"buckets": shapes}, train={"micro_batch": 4, "global_batch": 16})
    rows = micro_batch_rows(config)
    costs = [row_cost(config, shape) for shape in config.data.shapes]
    assert rows[-1] == 4, "the dearest has train.micro_batch"
    for number, cost in zip(rows, costs, strict=True):
        assert number * cost == pytest.approx(4 * max(costs), abs=cost / 2 + 1)
    given_cost = [shape | {"cost": cost} for shape, cost in zip(shapes, (1, 1, 1, 1, 1, 2), strict=True)]
    measured = configure(data={"buckets": given_cost}, train={"micro_batch": 4, "global_batch": 16})
    assert micro_batch_rows(measured) == (8, 8, 8, 8, 8, 4)
    by_hand = configure(data={"buckets": [shapes[-1] | {"rows": 3}]}, train={"micro_batch": 4, "global_batch": 16})
    assert micro_batch_rows(by_hand) == (3,)
    with pytest.raises(ValueError, match="no clip goes to the bucket of 1 frames of 16x16"):
        schedule_of(config, [0.0] + [1.0] * 5)
    with pytest.raises(ValueError, match=r"lower `keep` of the larger or longer ones$"):
        schedule_of(config, [0.0] + [1.0] * 5)
    with pytest.raises(ValueError, match=r"leave it out of data.buckets, or set data.longest_first=true"):
        schedule_of(config, [1.0] * 5 + [0.0])


@pytest.mark.parametrize(
    ("data", "more", "part"),
    [
        ({"buckets": [{"num_frames": 5, "height": 30, "width": 32}]}, {}, "data.buckets.0.height=30 is not divisible"),
        ({"buckets": [{"num_frames": 4, "height": 32, "width": 32}]}, {}, "data.buckets.0.num_frames=4 is not 1 +"),
        ({"buckets": [{"num_frames": 5, "height": 32, "width": 32}] * 2}, {}, "holds 2 of 5x32x32"),
        (
            {"buckets": [{"num_frames": 5, "height": 32, "width": 32, "cost": 2.0},
                         {"num_frames": 1, "height": 32, "width": 32}]}, {}, "cost of some and not of all",
        ),
        ({"buckets": [{"num_frames": 5, "height": 32, "width": 32}], "image_rows": 1}, {}, "num_frames=1 instead"),
        ({"buckets": [{"num_frames": 5, "height": 32, "width": 32}], "cache_latents": True}, {}, "leave one out"),
        ({"buckets": [{"num_frames": 5, "height": 32, "width": 32}]}, {"parallel": {"pipeline": 2}}, "of one shape"),
        ({"train": "", "mixture": []}, {}, "data.train is not set"),
        ({"mixture": [{"path": "a", "weight": 1}]}, {}, "two ways to say the same"),
        ({"train": "", "mixture": [{"path": "a", "weight": 1}]}, {}, "has no last clips to validate on"),
        (
            {"train": "", "num_validation": 0, "mixture": [{"path": p, "weight": 1} for p in ("x/a", "y/a/")]}, {},
            "holds 2 folders named a",
        ),
        (
            {"train": "", "num_validation": 0, "mixture": [{"path": "a", "weight": 1}], "cache_latents": True}, {},
            "draws from several",
        ),
        (
            {"train": "", "num_validation": 0, "mixture": [{"path": "a", "weight": 1}] * 2}, {},
            "names a 2 times",
        ),
    ],
)  # fmt: skip
def test_faults(configure: Configure, data: dict, more: dict, part: str) -> None:
    with pytest.raises(ConfigError, match=part.replace(".", r"\.").replace("+", r"\+")):
        resolve(configure(data=data, **more), 2 if more else None)
