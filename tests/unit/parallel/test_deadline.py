"""When a section is too long: measured on a clock of the test's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from parallel.deadline import LEAST_STEPS, Deadline


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def steps(deadline: Deadline, clock: Clock, number: int, seconds: float, *after: tuple[str, float]) -> None:
    for _ in range(number):
        for section, share in (("data", 0.1), ("agreement", 0.1), ("compute", 0.6), ("update", 0.2)):
            deadline.enter(section)
            clock.now += share * seconds
        for section, long_s in after:
            deadline.enter(section)
            clock.now += long_s


def build(factor: float = 10.0, floor_s: float = 3.0) -> tuple[Deadline, Clock]:
    clock = Clock()
    return Deadline(factor, floor_s, 600.0, clock), clock


def test_the_first_step_takes_as_long_as_it_likes() -> None:
    deadline, clock = build()
    deadline.enter("data")
    clock.now += 1e5
    assert deadline.limit_s() is None
    steps(deadline, clock, 1, 1.0)
    deadline.enter("data")
    assert deadline.limit_s() == 600.0, "the second has the timeout"


def test_the_median_and_the_floor() -> None:
    deadline, clock = build()
    steps(deadline, clock, LEAST_STEPS + 1, 1.0)
    assert deadline.limit_s() == pytest.approx(10.0)
    clock.now += 9.0  # after the 0.2 s of the update
    assert deadline.exceeded() is None
    clock.now += 1.0
    age, limit = deadline.exceeded() or (0.0, 0.0)
    assert (age, limit) == pytest.approx((10.2, 10.0))
    deadline, clock = build(floor_s=50.0)
    steps(deadline, clock, LEAST_STEPS + 1, 1.0)
    assert deadline.limit_s() == 50.0


def test_other_sections_are_neither_limited_nor_measured() -> None:
    deadline, clock = build()
    steps(deadline, clock, 10, 1.0, ("save", 500.0), ("review", 700.0))
    assert deadline.exceeded() is None
    assert deadline.limit_s() is None
    deadline.enter("data")
    assert deadline.limit_s() == pytest.approx(10.0)
    deadline.enter("first pass")
    clock.now += 400.0
    assert deadline.exceeded() is None
    deadline.enter("update")
    deadline.enter("data")
    assert deadline.limit_s() == pytest.approx(10.0), "a step with a first pass is not measured"


def test_a_process_that_did_not_run_is_excused() -> None:
    deadline, clock = build()
    steps(deadline, clock, 10, 1.0)
    clock.now += 300.0
    assert deadline.exceeded() is not None
    deadline.excuse(300.0)
    assert deadline.exceeded() is None


def test_zero_is_never() -> None:
    deadline, clock = build(factor=0.0)
    steps(deadline, clock, 10, 1.0)
    clock.now += 1e6
    assert deadline.exceeded() is None


ALONE = """
import time
from parallel.ranks import start_ranks

def hang():
    time.sleep(60)

with start_ranks("cpu", 600.0, 10.0, 0.5) as ranks:
    for step in range(1, 20):
        ranks.heartbeat.beat(step, "data")
        if step == 10:
            hang()
        time.sleep(0.01)
        ranks.heartbeat.beat(step, "compute")
"""


def test_one_process_is_ended_too() -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=root, capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert "in hang" in done.stderr, "its stack"
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("vidit: section data of step 10 hangs: ")
    assert "0.5 s are allowed (parallel.hang_factor, hang_floor_s)" in last
