"""Packed rows: no row over the limit, alike in cost, every clip once an epoch, the same on any ranks, from any step."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidit.batching import clip_tokens, numbers_per_step
from vidit.config import Bucket, Data, Model, RunConfig, Train
from vidit.data.buckets import schedule_of
from vidit.data.order import counts_of
from vidit.data.packed import FEWEST_ROWS, Load, PackedRow, PackedRows, _filled, _patterns

TOKENS = (16, 120, 300, 520)
MIXED = Load(counts_of([4, 3, 2, 1]), TOKENS, tuple(t * (1 + t / 400) for t in TOKENS))


def places_of(rows: list[PackedRow]) -> list[tuple[int, int]]:
    return [(bucket, place) for row in rows for bucket, places in row.clips for place in places]


def tokens_of(schedule: PackedRows, row: PackedRow) -> int:
    return sum(len(places) * schedule.load.tokens[bucket] for bucket, places in row.clips)


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    sizes=st.lists(st.integers(1, 50), min_size=5, max_size=5),
    limit=st.integers(50, 200), per_step=st.integers(1, 6), step=st.integers(0, 10**6),
)  # fmt: skip
def test_a_window_of_steps_takes_each_bucket_without_a_gap(
    counts: list[int], sizes: list[int], limit: int, per_step: int, step: int
) -> None:
    tokens = tuple(sizes[: len(counts)])
    schedule = PackedRows(3, Load(tuple(counts), tokens, tuple(float(t**2) for t in tokens)), limit, per_step)
    found = [row for s in range(step, step + 4) for row in schedule.dealt(s)]
    assert all(isinstance(row, PackedRow) and row.clips for row in found)
    assert all(tokens_of(schedule, row) <= limit for row in found)
    seen: dict[int, int] = {}
    for bucket, place in places_of(found):
        assert seen.setdefault(bucket, place) == place
        seen[bucket] += 1
    numbers = [number for row in found for number in row.rows]
    assert numbers == sorted(set(numbers))
    for row, of_step in zip(found, np.repeat(range(step, step + 4), per_step).tolist(), strict=True):
        assert of_step * schedule.stride <= row.rows.start < row.rows.stop <= (of_step + 1) * schedule.stride
        assert len(row.rows) == sum(len(places) for _, places in row.clips)


@pytest.mark.parametrize(
    ("load", "limit", "num_rows"),
    [
        (Load((4096,), (48,), (1.0,)), 80, 4096),
        (Load((2048, 2048), (640, 560), (2.0, 1.0)), 1000, 4096),
        (Load((3686, 410), (60, 30), (2.0, 1.0)), 100, 3686),
        (Load((1, 4095), (51, 50), (2.0, 1.0)), 100, 2049),
    ],
)
def test_clips_above_half_of_the_limit_have_rows_of_their_own(load: Load, limit: int, num_rows: int) -> None:
    patterns = _patterns(load, limit)
    assert len(patterns) == num_rows
    assert tuple(patterns.sum(axis=0)) == load.counts
    assert patterns.sum(axis=1).min() == 1
    schedule = PackedRows(0, load, limit, 4)
    assert all(row.rows for step in range(num_rows // 4) for row in schedule.step(step))


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(1, 3000), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 200), min_size=4, max_size=4),
    costs=st.lists(st.floats(0.1, 100), min_size=4, max_size=4),
    limit=st.integers(200, 600),
)  # fmt: skip
def test_a_block_has_no_row_without_a_clip_and_none_that_it_could_do_without(
    counts: list[int], sizes: list[int], costs: list[float], limit: int
) -> None:
    num = len(counts)
    load = Load(tuple(counts), tuple(sizes[:num]), tuple(costs[:num]))
    block, patterns = load.lengthened(limit), _patterns(load, limit)
    assert tuple(patterns.sum(axis=0)) == block.counts
    assert patterns.any(axis=1).all()
    assert (patterns @ np.array(load.tokens)).max() <= limit
    assert len(patterns) >= block.fewest(limit) >= FEWEST_ROWS
    assert len(patterns) == block.fewest(limit) or _filled(block, limit, len(patterns) - 1) is None
    times = block.counts[0] // load.counts[0]
    assert tuple(count * times for count in load.counts) == block.counts
    assert times == 1 or (times - 1) * load.total < FEWEST_ROWS * limit


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    seed=st.integers(0, 10**6), limit=st.integers(200, 3000),
)  # fmt: skip
def test_there_is_a_limit_that_fills_rows(sizes: list[int], seed: int, limit: int) -> None:
    shares = np.random.default_rng(seed).uniform(0.01, 1, len(sizes)).tolist()
    poor = PackedRows(0, Load(counts_of(shares, 512), tuple(sizes), tuple(map(float, sizes))), limit, 4)
    cure = poor.fuller(0.9)
    assert cure.fill >= 0.9
    assert limit <= cure.limit <= max(limit + max(sizes), 15 * max(sizes))
    assert cure.limit % max(sizes) == 0


def test_blocks_hold_each_bucket_as_often_as_its_share() -> None:
    schedule = PackedRows(0, MIXED, 1024, 8)
    rows = len({row.rows.start for s in range(40) for row in schedule.step(s)})
    assert rows == 320
    drawn = Counter(bucket for s in range(200) for bucket, _ in places_of(schedule.step(s)))
    total = sum(drawn.values())
    for bucket, count in enumerate(MIXED.counts):
        assert drawn[bucket] / total == pytest.approx(count / sum(MIXED.counts), abs=0.02)


def test_rows_are_full_and_cost_alike() -> None:
    schedule = PackedRows(0, MIXED, 1024, 16)
    assert schedule.fill > 0.99
    costs = [schedule.cost(row) for s in range(30) for row in schedule.step(s)]
    assert np.std(costs) / np.mean(costs) < 0.05
    assert np.mean([schedule.imbalance(s, 8) for s in range(30)]) < 1.05


def test_any_ranks_work_on_the_same_rows() -> None:
    schedule = PackedRows(5, MIXED, 1024, 8)
    alone = [schedule.of_rank(i, 0, 1) for i in range(16)]
    for world in (2, 4, 8):
        dealt = [schedule.of_rank(i, rank, world) for i in range(16 // world) for rank in range(world)]
        assert places_of(dealt) == places_of(alone)
        assert [row.rows for row in dealt] == [row.rows for row in alone]
    pair = schedule.of_rank(3, 1, 2)
    assert set(pair.rows) < set(pair.round_rows)
    assert pair.step_rows == sum(len(row.rows) for row in alone[:8])


def test_a_run_gets_them_from_its_buckets() -> None:
    shapes = (Bucket(num_frames=17, height=64, width=64), Bucket(num_frames=1, height=64, width=96))
    data = Data(train="x", buckets=shapes, packed_tokens=500, num_frames=17, height=64, width=64)
    config = RunConfig(
        name="x", model=Model(relative_position="rope"), data=data, train=Train(global_batch=4, micro_batch=1)
    )
    schedule = schedule_of(config, [0.25, 0.75])
    assert isinstance(schedule, PackedRows)
    assert schedule.load.tokens == tuple(clip_tokens(config, shape) for shape in shapes)
    assert schedule.load.counts == (1024, 3072)
    assert schedule.stride == numbers_per_step(config)
    with pytest.raises(ValueError, match="no clip goes to the bucket of 1 frames"):
        schedule_of(config, [1.0, 0.0])
