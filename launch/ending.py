"""How ranks ended, and which of their endings was the cause of all: one answer, for every way of starting them."""

import signal
from collections.abc import Sequence
from typing import NamedTuple, TypedDict


class Ended(TypedDict):
    """How one rank ended; plain values, which cross between processes.

    code: 0 for a good end, negative for a signal; None where it did not leave when asked, or its node is gone.
    fault: the rank that it blames, None where it blames none.
    message, trace, time: of its report; empty and 0 where it left none.
    retry: whether another start may do better, as far as it can tell.
    """

    rank: int
    code: int | None
    fault: int | None
    message: str
    trace: str
    time: float
    retry: bool


class Ending(NamedTuple):
    """How a launch ended: the rank at fault (None: none of them), why, the exit code as a shell gives it, whether
    another start may do better, and the traceback.
    """

    rank: int | None
    message: str
    code: int = 1
    retry: bool = True
    trace: str = ""

    @property
    def who(self) -> str:
        return "" if self.rank is None else f"rank {self.rank}: "


def lost(rank: int, why: str) -> Ended:
    """A rank that is gone with whoever started it."""
    return Ended(rank=rank, code=None, fault=None, message=why, trace="", time=0.0, retry=True)


def left(rank: int) -> Ended:
    """A rank that did not leave when asked, and without a word of why."""
    return Ended(rank=rank, code=None, fault=rank, message="", trace="", time=0.0, retry=True)


def ending_of(endings: Sequence[Ended]) -> Ending:
    """The cause: a node that is gone, a rank that a signal ended, the first report, a rank without one.

    A rank that a signal ended leaves no report; what the others say of it is who it was and what it did last. Else what
    a rank says of itself comes before what others say of it, and that in the order of time.
    """
    failed = [one for one in endings if one["code"] != 0]
    gone = [one for one in failed if one["code"] is None and one["message"]]
    if gone:
        return Ending(None, gone[0]["message"])
    # Whom a signal ended before who had to be killed in the end.
    codes = {one["rank"]: one["code"] for one in sorted(failed, key=lambda one: one["code"] is None)}
    killed = {rank: code for rank, code in codes.items() if _is_killed(code)}
    said = [one for one in failed if one["message"]]
    reports = sorted(said, key=lambda one: (one["fault"] != one["rank"], one["time"]))
    if reports:
        told = next((one for one in reports if one["fault"] in killed), reports[0])
        rank = told["fault"]
        how = f"{_how(killed[rank])}: " if rank in killed else ""
        code = _code(codes.get(rank, 1)) if rank is not None else 1
        return Ending(rank, how + told["message"], code, told["retry"] or rank in killed, told["trace"])
    for rank in [*killed, *codes]:
        why = _how(codes[rank])
        return Ending(rank, why if codes[rank] is None else f"{why} without a message", _code(codes[rank]))
    return Ending(None, "all ranks left before the run was done: something else has asked one of them to stop")


def _is_killed(code: int | None) -> bool:
    """SIGTERM is how the others of a failed rank are asked to leave."""
    return code is None or (code < 0 and code != -signal.SIGTERM)


def _how(code: int | None) -> str:
    if code is None:
        return "did not leave when asked, so it was killed"
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _code(code: int | None) -> int:
    """As a shell would give it."""
    if code is None:
        return 128 + signal.SIGKILL
    return 128 - code if code < 0 else code
