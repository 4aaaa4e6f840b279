"""Which blocks and which rank a stage has: the best cut there is, and every fault with its numbers."""

from __future__ import annotations

import itertools
import random

import pytest

from parallel.stages import Schedule, cut, is_v, micro_batch_faults, rank_of_stage, stage_faults


def largest(costs: list[float], stages: list[range], first: float, last: float) -> float:
    own = [sum(costs[i] for i in layers) for layers in stages]
    own[0] += first
    own[-1] += last
    return max(own)


def best(costs: list[float], num_stages: int, first: float, last: float) -> float:
    """By trying every cut."""
    found = []
    for places in itertools.combinations(range(1, len(costs)), num_stages - 1):
        edges = [0, *places, len(costs)]
        found.append(largest(costs, [range(a, b) for a, b in itertools.pairwise(edges)], first, last))
    return min(found)


@pytest.mark.parametrize("seed", range(30))
def test_no_cut_has_a_smaller_largest_stage(seed: int) -> None:
    draw = random.Random(seed)
    costs = [float(draw.choice([1, 2, 5, 9])) for _ in range(draw.randint(1, 9))]
    num_stages = draw.randint(1, len(costs))
    first, last = float(draw.choice([0, 3, 20])), float(draw.choice([0, 2, 30]))
    stages = cut(costs, num_stages, first, last)
    assert [i for layers in stages for i in layers] == list(range(len(costs)))
    assert all(len(layers) >= 1 for layers in stages)
    assert largest(costs, stages, first, last) == best(costs, num_stages, first, last)


def test_a_dear_end_gets_fewer_blocks() -> None:
    assert cut([1] * 8, 4) == [range(2), range(2, 4), range(4, 6), range(6, 8)]
    assert cut([1] * 8, 2, last=4) == [range(6), range(6, 8)]
    assert cut([1] * 8, 2, first=4) == [range(2), range(2, 8)]
    assert cut([1, 1, 1, 9], 2) == [range(3), range(3, 4)]


def test_equal_cuts_are_evened_out() -> None:
    """The last block decides the pace; the others are not heaped up in front of it."""
    assert cut([1, 1, 1, 1, 9], 3) == [range(2), range(2, 4), range(4, 5)]


def test_more_stages_than_blocks() -> None:
    with pytest.raises(ValueError, match="3 blocks cannot be cut into 4 stages of at least 1; use 1 to 3"):
        cut([1, 1, 1], 4)


def test_order_on_ranks() -> None:
    assert rank_of_stage("1f1b", 4, 1) == [0, 1, 2, 3]
    assert rank_of_stage("interleaved", 2, 3) == [0, 1, 0, 1, 0, 1]
    assert rank_of_stage("zero_bubble", 3, 1) == [0, 1, 2]
    assert rank_of_stage("zero_bubble", 3, 2) == [0, 1, 2, 2, 1, 0]
    assert is_v("zero_bubble", 2)
    assert not is_v("interleaved", 2)


@pytest.mark.parametrize(
    ("blocks", "schedule", "pipeline", "each", "message"),
    [
        (6, "1f1b", 8, 1, r"pipeline=8 x .*=1 = 8 stages, but the model has 6 blocks .*pipeline of at most 6"),
        (6, "interleaved", 4, 2, r"pipeline=4 x .*=2 = 8 stages, but the model has 6 blocks .* of at most 3"),
        (12, "gpipe", 2, 2, "stages_per_rank=2 has no place in parallel.schedule=gpipe"),
        (12, "interleaved", 2, 1, "interleaves nothing; use 2 or more"),
        (12, "zero_bubble", 2, 3, "not parallel.stages_per_rank=3; use 1 or 2"),
        (12, "1f1b", 1, 2, "stages_per_rank=2 has no effect with parallel.pipeline=1"),
    ],
)
def test_faults_of_stages(blocks: int, schedule: Schedule, pipeline: int, each: int, message: str) -> None:
    (fault,) = stage_faults(blocks, schedule, pipeline, each)
    with pytest.raises(ValueError, match=message):
        raise ValueError(fault)


@pytest.mark.parametrize(("schedule", "each"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 3), ("zero_bubble", 2)])
def test_stages_that_fit(schedule: Schedule, each: int) -> None:
    assert not list(stage_faults(12, schedule, 4, each))
    assert not list(stage_faults(1, schedule, 1, 1))


@pytest.mark.parametrize(
    ("schedule", "each", "number", "message"),
    [
        ("1f1b", 1, 3, r"pipeline=4 gets 3 micro-batches .* at least 4, .* use one of 4 5 6 7 8 9, .* of one of 8 10 12 14"),
        ("interleaved", 2, 9, r"gets 9 micro-batches .* = 2 of them; use one of 5 6 7 8 10 12, .* of one of 10 12 14"),
        ("zero_bubble", 1, 13, r"gets 13 micro-batches .* = 3 of them"),
    ],
)
def test_faults_of_micro_batches(schedule: Schedule, each: int, number: int, message: str) -> None:
    (fault,) = micro_batch_faults(schedule, 4, each, number, 2)
    with pytest.raises(ValueError, match=message):
        raise ValueError(fault)


@pytest.mark.parametrize(
    ("schedule", "each", "numbers"),
    [
        ("gpipe", 1, [1, 2, 7]),
        ("1f1b", 1, [4, 5, 9]),
        ("interleaved", 2, [1, 3, 4, 7, 8, 10, 12]),
        ("zero_bubble", 1, [1, 3, 4, 7, 8, 10, 12]),
        ("zero_bubble", 2, [1, 2, 5, 9]),
    ],
)
def test_micro_batches_that_fit(schedule: Schedule, each: int, numbers: list[int]) -> None:
    assert not [n for n in numbers if list(micro_batch_faults(schedule, 4, each, n, 1))]
