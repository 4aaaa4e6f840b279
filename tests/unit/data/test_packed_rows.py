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
from vidit.data.packed import Load, PackedRow, PackedRows

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
    assert max(schedule.imbalance(s, 8) for s in range(30)) < 1.05


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
