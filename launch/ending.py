"""How ranks ended, and which of their endings was the cause of all: one answer, for every way of starting them."""

import signal
from collections.abc import Mapping, Sequence
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


def stayed(rank: int) -> Ended:
    """A rank that did not leave when asked, and said no word of why."""
    return Ended(rank=rank, code=None, fault=rank, message="", trace="", time=0.0, retry=True)


def ending_of(endings: Sequence[Ended]) -> Ending:
    """The cause: a node that is gone, a rank that a signal ended, the first report, a rank without one.

    A rank that a signal ended leaves no report; what the others say of it is who it was and what it did last. Else what
    a rank says of itself comes before what others say of it, and that in the order of time. One that stayed when it was
    asked to leave is a cause only where nothing else is: it may have been saving.
    """
    failed = [one for one in endings if one["code"] != 0]
    gone = [one for one in failed if one["code"] is None and one["message"]]
    if gone:
        return Ending(None, gone[0]["message"])
    codes = {one["rank"]: one["code"] for one in sorted(failed, key=lambda one: _order(one["code"]))}
    killed = [rank for rank, code in codes.items() if _order(code) == 0]
    said = [one for one in failed if one["message"]]
    reports = sorted(said, key=lambda one: (one["fault"] != one["rank"], one["time"]))
    told = _told(reports, codes, killed)
    if told is not None:
        return _reported(told, codes)
    for rank, code in codes.items():
        return Ending(rank, _how(code) + ("" if code is None else " without a message"), _code(code))
    return Ending(None, "all ranks left before the run was done: something else has asked one of them to stop")


def _told(reports: Sequence[Ended], codes: Mapping[int, int | None], killed: Sequence[int]) -> Ended | None:
    """The report that counts, the first of them in doubt; None where none is worth more than an exit code."""
    silent = [rank for rank, code in codes.items() if code is None]
    own = [one for one in reports if one["fault"] == one["rank"]]
    about_killed, about_silent = ([one for one in reports if one["fault"] in ranks] for ranks in (killed, silent))
    told = next(iter([*about_killed, *own, *about_silent, *reports]), None)
    # That of a rank whose store went with the rank that was killed.
    return None if told is not None and told["fault"] is None and killed else told


def _reported(told: Ended, codes: Mapping[int, int | None]) -> Ending:
    rank = told["fault"]
    code = 1 if rank is None else codes.get(rank, 1)
    silent = rank in codes and _order(code) != 1
    how = f"{_how(code)}: " if silent else ""
    return Ending(rank, how + told["message"], _code(code), told["retry"] or silent, told["trace"])


def _order(code: int | None) -> int:
    """Ended by a signal, 0, before any other exit code, before who stayed; SIGTERM asks the others to leave."""
    if code is None:
        return 2
    return 0 if code < 0 and code != -signal.SIGTERM else 1


def _how(code: int | None) -> str:
    if code is None:
        return "did not leave when asked, so it was killed"
    if code > 0:
        return f"ended with exit code {code}"
    known = -code in {int(one) for one in signal.Signals}
    return f"ended by {signal.Signals(-code).name if known else f'signal {-code}'}"


def _code(code: int | None) -> int:
    """As a shell would give it."""
    if code is None:
        return 128 + signal.SIGKILL
    return 128 - code if code < 0 else code
