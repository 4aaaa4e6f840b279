"""One rank, from inside its own process: where it writes, how it is told to stop, how it says why it ended.

A process is a rank when RANK and WORLD_SIZE say so, whoever started it: a launch of ours or torchrun. Where srun
started it, its variables are read instead (`launch/srun.py`). A launch of ours (`launch/node_ranks.py`) also names a
folder in VIDIT_LAUNCH. There each rank holds a lock on a file `rank-N` for as long as it lives, and the launcher one on
`launcher`: locks end with their process however that ends, so either side sees when the other is gone.
"""

import fcntl
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

from launch import srun
from parallel.failure import RankError, report_of, write_report

FOLDER = "VIDIT_LAUNCH"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
POLL_S = 0.2
HOLD_S = 10.0  # a signal that nothing takes up in this time ends the process: nothing is under way yet
ORPHAN_S = 60.0  # what a rank without a launcher has to save and leave


@dataclass(frozen=True)
class Place:
    """Which rank this process is, of how many, and how many of them are on this machine."""

    rank: int
    world: int
    local_world: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Place | None":
        """The place that the environment gives; None where this process is alone."""
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return None
        world = int(environment["WORLD_SIZE"])
        return cls(int(environment["RANK"]), world, int(environment.get("LOCAL_WORLD_SIZE", world)))

    def check(self, local: int) -> None:
        """ValueError where `launch.local` says something else than what has been started."""
        if local not in (1, self.local_world):
            raise ValueError(
                f"launch.local={local} starts ranks, but this process is already rank {self.rank} of {self.world}, "
                f"{self.local_world} of them on this machine; leave launch.local out, or start one plain process"
            )


def own_place(local: int = 1) -> Place | None:
    """The place of this process, which starts `local` ranks if it is none.

    Where srun started it as one rank of several, the variables of torchrun are set, which everything else reads.
    """
    if "RANK" not in os.environ and local == 1:
        os.environ.update(srun.rank_variables(os.environ))
    return Place.of(os.environ)


@contextmanager
def rank_process(place: Place, logs: Path) -> Iterator[None]:
    """Run the block as this rank; an error ends the process here, after it is written down.

    Under a launch of ours the traceback of an error goes to `logs`/rank-N.log, where the launcher sends the output of
    every rank but 0, and the error itself into the report; a rank that others started prints it. The process then ends
    by os._exit: threads of a broken process group abort an ordinary exit.
    """
    folder = os.environ.get(FOLDER)
    log, held = logs / f"rank-{place.rank}.log", HeldSignals()
    record = _join(Path(folder), place) if folder else None
    threading.Thread(target=_watch, args=(held, Path(folder) if folder else None), daemon=True).start()
    try:
        yield
    except BaseException as error:
        _leave(error, place, log if folder else None)
    if record:
        record.write("done")
        record.flush()


def _join(folder: Path, place: Place) -> IO[str]:
    """Take this rank's file in the folder of the launch, which tells the launcher that it may be sent signals."""
    record = (folder / f"rank-{place.rank}").open("w")
    fcntl.flock(record, fcntl.LOCK_EX)
    record.write("begun\n")
    record.flush()
    return record


class HeldSignals:
    """Takes the signals that ask to stop until the run itself does, and then hands on what has come."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.since = 0.0
        # Python runs a handler between two of its own instructions, which may be long in coming: a rank that waits for
        # others in C++ is one. The bytes of this pipe come at once.
        self._bytes, written = os.pipe()
        for end in (self._bytes, written):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, self._hold)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _hold(self, number: int, _: FrameType | None) -> None:
        self.number, self.since = number, time.monotonic()

    def wait(self, seconds: float) -> None:
        """Until a signal comes, or so long."""
        if select.select([self._bytes], [], [], seconds)[0]:
            for number in os.read(self._bytes, 4096):
                if self.number is None and signal.getsignal(number) == self._hold:
                    self._hold(number, None)

    def hand_on(self) -> None:
        """Send again what was held, once somebody else handles it; end the process if nobody ever does."""
        if self.number is None:
            return
        if signal.getsignal(self.number) != self._hold:
            number, self.number = self.number, None
            os.kill(os.getpid(), number)
        elif time.monotonic() - self.since > HOLD_S:
            os._exit(128 + self.number)


def _watch(held: HeldSignals, folder: Path | None) -> None:
    """A thread of the rank: hands signals on, and asks the rank to stop when those who started it are gone."""
    parent, deadline = os.getppid(), None
    while True:
        held.wait(POLL_S)
        held.hand_on()
        if folder is None:
            continue
        launcher = folder / "launcher"  # which a sweep of temporary files may have taken away
        if deadline is None and (os.getppid() != parent or (launcher.exists() and not is_held(launcher))):
            deadline = time.monotonic() + ORPHAN_S
            os.kill(os.getpid(), signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            os._exit(1)


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock of a file."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _leave(error: BaseException, place: Place, log: Path | None) -> NoReturn:
    """Write down why, and end this process. A signal that comes now has nothing left to ask for."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    code = 130 if isinstance(error, KeyboardInterrupt) else 1
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    report = report_of(error, place.rank)
    line = f"vidit: {RankError(report.rank, report.message)}\n"
    told = os.environ.get("TORCHELASTIC_ERROR_FILE")
    try:
        if code and told:
            with suppress(OSError):  # the log says it too
                write_report(Path(told), report)
        if code and log:
            with log.open("a") as file:
                file.write(report.trace)
        elif code:
            sys.stderr.write(line)
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError as full:
        with suppress(OSError):
            os.write(2, f"{line}vidit: and {log or 'its output'} cannot be written: {full}\n".encode())
    finally:
        os._exit(code)
