"""Why a rank ends: an error that names the rank at fault, and the file in which whoever started it looks for that.

The file is the one of torchrun (TORCHELASTIC_ERROR_FILE) in its format, so a launch of ours and a plain torchrun
over many nodes both name the cause. No torch here: a launcher reads these files on a login node.
"""

import json
import os
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def is_shared(error: BaseException) -> bool:
    """Whether every rank raises this error, or its own word of it, at the same place."""
    return bool(getattr(error, "shared", False))


class RankError(RuntimeError):
    """What went wrong on some rank, or between the ranks; `rank` is the one at fault, None where no one is."""

    def __init__(self, rank: int | None, message: str):
        super().__init__(message if rank is None else f"rank {rank}: {message}")
        self.rank, self.message, self.shared = rank, message, False


@dataclass(frozen=True)
class Report:
    """What one rank left: the rank at fault as it sees it, the message without that name, the traceback, when.

    `retry`: whether another start may do better.
    """

    rank: int | None
    message: str
    trace: str
    time: float
    retry: bool = True


def report_of(error: BaseException, rank: int) -> Report:
    """A report of `rank`. An error with an attribute `rank` names another one as the cause."""
    message = error.message if isinstance(error, RankError) else str(error)
    if isinstance(error, KeyboardInterrupt):
        message = "interrupted"
    elif not message or not isinstance(error, (ValueError, RuntimeError, OSError)):
        message = f"{type(error).__name__}: {message}" if message else type(error).__name__
    cause: int | None = getattr(error, "rank", rank)
    return Report(cause, message, "".join(traceback.format_exception(error)), time.time(), may_pass(error))


def may_pass(error: BaseException) -> bool:
    """Whether a new start may get past an error. An attribute `retry` says so; what the user wrote does not change."""
    said = getattr(error, "retry", None)
    return bool(said) if said is not None else not isinstance(error, (ValueError, KeyboardInterrupt, SystemExit))


def write_report(path: Path, report: Report) -> None:
    """Write it for whoever started this rank; the first report of a process is the one that counts."""
    facts: dict[str, Any] = {
        "py_callstack": report.trace,
        "timestamp": str(int(report.time)),
        "rank": report.rank,
        "time": report.time,
    }
    facts["retry"] = report.retry
    # Whole at once: another thread of this process may end it while this one writes.
    written = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        written.write_text(json.dumps({"message": {"message": report.message, "extraInfo": facts}}))
        with suppress(FileExistsError):
            os.link(written, path)
    finally:
        written.unlink(missing_ok=True)


def read_report(path: Path) -> Report | None:
    """A report; None where there is none, or half of one."""
    try:
        message = json.loads(path.read_text())["message"]
        facts = message["extraInfo"]
        rank = None if facts["rank"] is None else int(facts["rank"])
        retry = bool(facts.get("retry", True))
        return Report(rank, str(message["message"]), str(facts["py_callstack"]), float(facts["time"]), retry)
    except (OSError, ValueError, KeyError, TypeError):
        return None
