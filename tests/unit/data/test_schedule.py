"""The order of a run as a pure function: every clip once an epoch, the same order for any ranks, resumed anywhere."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidit.data.order import ClipOrder, Shares, counts_of, split_places
from vidit.data.schedule import MicroBatch, Schedule

WORLDS = (1, 2, 3, 8, 1024)


def schedule_of(per_step: int, sizes: tuple[int, ...], costs: tuple[float, ...], counts: tuple[int, ...]) -> Schedule:
    return Schedule(Shares(7, "buckets", counts), per_step, sizes, costs)


def keys_of(order: ClipOrder, of: MicroBatch) -> list[int]:
    return [order.at(place) for place in split_places(of.number, len(of.rows), 0)[0]]


@given(shares=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), block=st.integers(16, 200))
def test_counts_follow_shares(shares: list[float], block: int) -> None:
    counts = counts_of(shares, block)
    assert min(counts) >= 1
    assert sum(counts) >= block
    for count, share in zip(counts, shares, strict=True):
        assert count <= max(1, share / sum(shares) * block + 1)
    if min(shares) / sum(shares) * block >= 1:
        assert sum(counts) == block
        assert all(abs(c - s / sum(shares) * block) < 1 for c, s in zip(counts, shares, strict=True))


def test_shares_refuse_what_is_not_above_zero() -> None:
    with pytest.raises(ValueError, match="above 0"):
        counts_of([1.0, 0.0])


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=5), start=st.integers(0, 10**9))
def test_shares_count_what_stood_before(counts: list[int], start: int) -> None:
    """A window of the stream, begun anywhere, numbers each group without a gap."""
    shares = Shares(3, "s", tuple(counts))
    seen: dict[int, int] = {}
    for place in range(start, start + 3 * sum(counts)):
        group, before = shares.at(place)
        assert seen.setdefault(group, before) == before
        seen[group] += 1
    block = sum(counts)
    if start % block == 0:
        assert [seen[group] - start // block * counts[group] for group in range(len(counts))] == [3 * c for c in counts]


@settings(max_examples=30, deadline=None)
@given(
    num_clips=st.integers(1, 3000), micro=st.integers(1, 4), workers=st.integers(1, 8), seed=st.integers(0, 99),
    data=st.data(),
)  # fmt: skip
def test_any_ranks_and_workers_deliver_the_same_order(
    num_clips: int, micro: int, workers: int, seed: int, data: st.DataObject
) -> None:
    """Each epoch holds each clip once; what is left from any step on is the same on any other world."""
    order = ClipOrder(seed, "clips", (np.arange(num_clips),))
    world, other = data.draw(st.sampled_from(WORLDS)), data.draw(st.sampled_from(WORLDS))
    per_step = int(np.lcm(world, other))
    schedule = schedule_of(per_step, (micro,), (1.0,), (1,))
    steps = -(-2 * num_clips // (per_step * micro))

    def delivered(world: int, first: int, last: int) -> list[int]:
        """What ranks and their workers deliver, in the order of the rows' numbers."""
        rows: dict[int, int] = {}
        per_rank = per_step // world
        for rank in range(world):
            mine = range(first * per_rank, last * per_rank)
            for worker in range(workers):  # each takes every n-th micro-batch, as the DataLoader deals them
                for index in mine[worker::workers]:
                    of = schedule.of_rank(index, rank, world)
                    assert not rows.keys() & set(of.rows), "two ranks have the same row"
                    rows |= zip(of.rows, keys_of(order, of), strict=True)
        assert sorted(rows) == list(range(first * per_step * micro, last * per_step * micro)), "no gap"
        return [rows[number] for number in sorted(rows)]

    if per_step * steps > 20_000:
        steps = max(1, 20_000 // per_step)
    whole = delivered(world, 0, steps)
    for epoch in range(len(whole) // num_clips):
        assert sorted(whole[epoch * num_clips : (epoch + 1) * num_clips]) == list(range(num_clips))
    stopped = data.draw(st.integers(0, steps))
    assert whole[: stopped * per_step * micro] + delivered(other, stopped, steps) == whole


def test_buckets_hold_every_clip_once_an_epoch() -> None:
    """Each bucket goes through its clips epoch by epoch, whatever the others do, for every number of ranks."""
    sizes, costs, num_clips = (4, 2, 1), (1.0, 2.0, 4.0), (40, 30, 10)
    shares = [n / size for n, size in zip(num_clips, sizes, strict=True)]
    schedule = schedule_of(12, sizes, costs, counts_of(shares))
    orders = [ClipOrder(1, f"clips/bucket {b}", (np.arange(n),)) for b, n in enumerate(num_clips)]
    whole = None
    for world in (1, 2, 3, 4, 6, 12):
        rows: dict[int, tuple[int, int]] = {}
        for step, rank, i in itertools.product(range(30), range(world), range(12 // world)):
            of = schedule.of_rank(step * 12 // world + i, rank, world)
            assert set(of.rows) <= set(of.round_rows)
            assert of.step_rows == sum(len(one.rows) for one in schedule.step(step))
            rows |= {row: (of.bucket, key) for row, key in zip(of.rows, keys_of(orders[of.bucket], of), strict=True)}
        if whole is None:
            whole = rows
        assert rows == whole
    assert whole is not None
    for bucket, num in enumerate(num_clips):
        drawn = Counter(key for b, key in whole.values() if b == bucket)
        assert len(drawn) == num
        assert max(drawn.values()) - min(drawn.values()) <= 1
    drawn_rows = Counter(bucket for bucket, _ in whole.values())
    for bucket, num in enumerate(num_clips):
        assert drawn_rows[bucket] / len(whole) == pytest.approx(num / sum(num_clips), rel=0.1)


def test_a_mixture_draws_by_weight_and_each_set_by_its_epochs() -> None:
    parts = (np.arange(0, 50), np.arange(50, 60))
    order = ClipOrder(5, "clips", parts, (1.0, 3.0))
    drawn = Counter(order.at(place) for place in range(4096))
    from_small = sum(drawn[int(clip)] for clip in parts[1])
    assert from_small == 3072
    assert max(drawn[int(c)] for c in parts[1]) - min(drawn[int(c)] for c in parts[1]) <= 1
    assert max(drawn[int(c)] for c in parts[0]) - min(drawn[int(c)] for c in parts[0]) <= 1
    for place in range(200):
        stand_in = order.instead(place, 0)
        assert (stand_in >= 50) == (order.at(place) >= 50), "what stands in is of the same data set"


def test_an_epoch_far_away_costs_no_more() -> None:
    order = ClipOrder(5, "clips", (np.arange(1000), np.arange(1000, 3000)), (1.0, 2.0))
    near, far = [order.at(place) for place in range(10)], [order.at(10**12 + place) for place in range(10)]
    assert near != far
    assert far == [order.at(10**12 + place) for place in range(10)]


def test_rounds_are_of_like_cost() -> None:
    """1, 17, 33 and 65 frames at three resolutions on 8 ranks: who waits, waits less than 5 %."""
    tokens = [t * s * s for t in (1, 5, 9, 17) for s in (8, 16, 32)]
    costs = tuple(float(n * (1 + n / 20_000)) for n in tokens)  # attention makes long clips dearer than their tokens
    sizes = tuple(max(1, round(2 * max(costs) / cost)) for cost in costs)
    schedule = schedule_of(64, sizes, costs, counts_of([1.0] * len(costs)))
    late = [schedule.imbalance(step, 8) for step in range(200)]
    assert sum(late) / len(late) < 1.05, f"mean {sum(late) / len(late):.3f}, worst {max(late):.3f}"
    assert max(late) < 1.1
    dealt = [
        sum(max(map(schedule.cost, plain[i : i + 8])) for i in range(0, 64, 8)) * 8 / sum(map(schedule.cost, plain))
        for plain in (schedule.step(step) for step in range(200))
    ]
    assert sum(dealt) / len(dealt) > sum(late) / len(late), "sorting is what does it"
