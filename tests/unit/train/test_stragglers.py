"""Which rank is slow, and when that is said."""

from __future__ import annotations

from vidit.train.stragglers import LEAST_STEPS, Slowest, Stragglers, slowest


def test_the_slowest_and_where() -> None:
    found = slowest([[0.1, 1.0, 0.2], [0.1, 1.1, 0.2], [0.9, 1.0, 0.2], [0.1, 1.0, 0.2]])
    assert found is not None
    assert (found.rank, found.part) == (2, "data")
    assert round(found.own_s, 6) == 2.1
    assert round(found.others_s, 6) == 1.3
    assert round(found.excess, 3) == 0.615


def test_alone() -> None:
    assert slowest([[0.1, 1.0, 0.2]]) is None
    assert Stragglers(0.25).compare() is None


def test_said_once_while_it_lasts() -> None:
    stragglers = Stragglers(0.25)
    slow, fair = Slowest(1, 1.5, 1.0, "data", 1.2), Slowest(1, 1.1, 1.0, "data", 1.0)
    stragglers.add(0.1, 0.2, 0.3)
    assert stragglers.word(slow) is None, "one step says nothing"
    for _ in range(LEAST_STEPS):
        stragglers.add(0.1, 0.2, 0.3)
    assert stragglers.word(fair) is None
    word = stragglers.word(slow)
    assert word is not None
    assert word.startswith(
        "rank 1 is slow: 1.5 s a step for its own work, 50% more than the other ranks (1 s), most of"
    )
    assert stragglers.word(slow) is None
    assert stragglers.word(fair) is None
    assert stragglers.word(slow) is not None, "it is slow again"


def test_one_slow_step_is_no_slow_rank() -> None:
    stragglers = Stragglers(0.25)
    for number in range(20):
        stragglers.add(5.0 if number == 7 else 0.1, 0.2, 0.3)
    assert slowest([[sorted(p)[10] for p in zip(*stragglers.steps, strict=True)], [0.1, 0.2, 0.3]]).excess == 0  # type: ignore[union-attr]
