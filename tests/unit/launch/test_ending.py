"""Which of the endings of ranks was the cause of all."""

from __future__ import annotations

import signal

import pytest

from launch.ending import Ended, Ending, ending_of, lost, stayed


def ended(rank: int, code: int | None, fault: int | None = None, message: str = "", time: float = 0.0) -> Ended:
    """With a report where there is a message."""
    fault = fault if message else rank
    return Ended(rank=rank, code=code, fault=fault, message=message, trace="", time=time, retry=True)


WELL = ended(9, 0)
KILLED = ended(1, -9)


def test_what_a_rank_says_of_itself_comes_first() -> None:
    others = ended(0, 1, 2, "no such clip, they say", 9.0)
    own = ended(2, 3, 2, "no such clip", 10.0)
    assert ending_of([others, own, WELL]) == Ending(2, "no such clip", 3)


def test_then_the_first_report() -> None:
    late, early = ended(0, 1, 3, "is slow", 12.0), ended(1, 1, 2, "is silent", 11.0)
    assert ending_of([late, early])[:2] == (2, "is silent")


def test_a_killed_rank_is_the_cause() -> None:
    """Another survivor may have been first, with a worse guess."""
    found = ending_of(
        [ended(0, 1, 1, "gives no sign of life", 10.0), ended(3, 1, 2, "gives no sign of life, last in data", 11.0),
         ended(2, -9), ended(1, -signal.SIGTERM)]
    )  # fmt: skip
    assert found == Ending(2, "ended by SIGKILL: gives no sign of life, last in data", 128 + signal.SIGKILL)


def test_a_rank_that_had_to_be_killed() -> None:
    """Stopped, not killed: the SIGKILL came at the end."""
    found = ending_of([ended(0, 1, 1, "gives no sign of life"), stayed(1)])
    assert found == Ending(1, "did not leave when asked, so it was killed: gives no sign of life", 137)
    assert ending_of([WELL, stayed(2)])[:2] == (2, "did not leave when asked, so it was killed")


def test_one_that_saves_for_long_is_not_the_cause() -> None:
    assert ending_of([stayed(0), ended(1, 1, 1, "no such clip")])[:2] == (1, "no such clip")
    assert ending_of([stayed(0), KILLED])[:2] == (1, "ended by SIGKILL without a message")
    assert ending_of([stayed(0), ended(1, 7)]) == Ending(1, "ended with exit code 7 without a message", 7)
    blamed = [ended(0, 1, 2, "gives no sign of life"), ended(1, 1, 1, "no such clip"), stayed(2)]
    assert ending_of(blamed)[:2] == (1, "no such clip")


def test_whose_store_was_killed_with_it() -> None:
    """What the others say then blames nobody."""
    found = ending_of([ended(0, -9), ended(1, 1, None, "Connection closed by peer; and the store is gone too")])
    assert found == Ending(0, "ended by SIGKILL without a message", 137)
    named = ending_of([ended(0, -9), ended(1, 1, 0, "is gone, and with it the store")])
    assert named == Ending(0, "ended by SIGKILL: is gone, and with it the store", 137)


def test_a_node_that_is_gone_explains_the_rest() -> None:
    gone = lost(1, "node 10.0.0.2 or its actor is gone")
    found = ending_of([ended(0, 1, 1, "gives no sign of life"), gone])
    assert found == Ending(None, "node 10.0.0.2 or its actor is gone")
    assert found.who == ""


@pytest.mark.parametrize(
    ("code", "message", "told"),
    [
        (-11, "ended by SIGSEGV", 139),
        (-35, "ended by signal 35", 163),
        (7, "ended with exit code 7", 7),
    ],
)
def test_no_report(code: int, message: str, told: int) -> None:
    assert ending_of([WELL, ended(1, code)]) == Ending(1, f"{message} without a message", told)


def test_nobody_is_at_fault() -> None:
    assert ending_of([ended(0, 1, None, "none is behind")]) == Ending(None, "none is behind", 1)
    assert ending_of([WELL]).message.startswith("all ranks left before the run was done")


def test_what_the_user_wrote_would_fail_again() -> None:
    wrong = ended(1, 1, 1, "no such clip")
    wrong["retry"] = False
    assert not ending_of([wrong]).retry
    assert ending_of([KILLED]).retry
