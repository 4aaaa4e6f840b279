"""The ranks of one node: ordinary processes that run the same command and know their place from the environment.

A rank is a process of its own, so it handles signals, dies and is killed as it does anywhere. Whoever starts ranks
here (`launch/local.py`, an actor of Ray) is their launcher in the sense of `launch/rank.py`: it holds a lock in their
folder, so ranks whose launcher is gone ask themselves to stop. No torch here, so that nothing comes before their start.
"""

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO

from launch.ending import Ended
from launch.rank import FOLDER, is_held
from parallel.failure import read_report

PREFIX = "vidit-launch-"
POLL_S = 0.1
KILLED_S = 10.0
# SLURM sends SIGUSR1 to every process of a step; a rank that has just begun would die of it, so there it waits.
BLOCKED = (signal.SIGUSR1, signal.SIGUSR2)
STALE_S = 3600.0  # a folder without a living process, after which its launcher was killed and all its ranks have left


def _sweep() -> None:
    """Remove the folders of launchers that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > STALE_S and not any(map(is_held, folder.iterdir())):
                shutil.rmtree(folder)


@contextmanager
def _blocked() -> Iterator[None]:
    """While entered, what this thread starts is not sent `BLOCKED` before it lets them through (`launch/rank.py`)."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """A rank and its children: it leads a process group."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _appending(path: str | None) -> AbstractContextManager[IO[bytes] | None]:
    """A file, and its folder, for output; None stays None."""
    if path is None:
        return nullcontext()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(path).open("ab")


class NodeRanks:
    """`count` ranks of `world`, the first of them `first`. Methods may be called while `wait` waits.

    `leave_s` is what the others of the node get to save and leave, or to say why they cannot, once one has failed.
    """

    def __init__(self, first: int, count: int, world: int, leave_s: float):
        self.first, self.count, self.world, self.leave_s = first, count, world, leave_s
        self.processes: list[subprocess.Popen[bytes]] = []
        self.came: list[int] = []
        self.ended = False
        self.deadline = float("inf")
        self._sent = [0] * count
        _sweep()
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._lock = (self.folder / "launcher").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._port: socket.socket | None = None

    def meeting_point(self, address: str) -> list[str]:
        """Address and port at which the ranks can meet on this node, which others know by `address`.

        Until rank 0 listens there, on all addresses, the system gives the port to nobody else.
        """
        both = socket.has_dualstack_ipv6()
        self._port = socket.socket(socket.AF_INET6 if both else socket.AF_INET)
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if both:
            self._port.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self._port.bind(("", 0))
        return [address, str(self._port.getsockname()[1])]

    def start(
        self,
        command: Sequence[str],
        meet: Sequence[str],
        variables: Mapping[str, str],
        outputs: Sequence[str | None],
        workdir: str | None = None,
    ) -> None:
        """Start the ranks, unless a request to stop has come before; `outputs` are files to which they append, None
        for where this process writes.
        """
        if self.came or self.ended:
            return
        for local, path in enumerate(outputs):
            if self.ended:
                return
            with _appending(path) as out, _blocked():
                process = subprocess.Popen(
                    list(command), cwd=workdir, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                    start_new_session=True, env={**os.environ, **variables, **self._place(local, meet)},
                )  # fmt: skip
            self.processes.append(process)
            if self.ended:  # in the meantime
                _kill(process)

    def _place(self, local: int, meet: Sequence[str]) -> dict[str, str]:
        """The variables of torchrun, which say where a rank stands."""
        rank = self.first + local
        return {
            "RANK": str(rank), "WORLD_SIZE": str(self.world), "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(self.count), "MASTER_ADDR": meet[0], "MASTER_PORT": meet[1],
            "TORCHELASTIC_USE_AGENT_STORE": "False", "TORCHELASTIC_ERROR_FILE": str(self._report(rank)),
            FOLDER: str(self.folder),
        }  # fmt: skip

    def _report(self, rank: int) -> Path:
        return self.folder / f"error-{rank}.json"

    def ask(self, number: int = signal.SIGTERM) -> None:
        """Send every rank a signal, by default the one that asks to save and leave, once it can take it."""
        self.came.append(number)

    def hurry(self) -> None:
        """Let the wait end `leave_s` from now, if not before."""
        self.deadline = min(self.deadline, time.monotonic() + self.leave_s)

    def wait(self, each: Callable[[], None] = lambda: None) -> list[Ended]:
        """How each rank ended. Returns when all have; where one has failed the others are asked to leave, and those
        that have not done so in time are told of with code None. `each` is called whenever it has looked.
        """
        while self._tend():
            each()
            time.sleep(POLL_S)
        return [self._ending(local) for local in range(len(self.processes))]

    def _tend(self) -> bool:
        """Pass signals on, and ask the others to leave once a rank has failed. Whether ranks run and have time left."""
        codes = [self._code(local) for local in range(len(self.processes))]
        if self.deadline == float("inf") and any(codes):
            self.ask()
            self.hurry()
        for local, code in enumerate(codes):
            if code is None:
                self._forward(local)
        return None in codes and time.monotonic() < self.deadline

    def _code(self, local: int) -> int | None:
        """The exit code; 0 too for a rank that had done its work and failed in the end of its process."""
        code = self.processes[local].poll()
        return 0 if code and self._file(local).endswith("done") else code

    def _file(self, local: int) -> str:
        """What the rank has written into the file that it locks while it lives; empty before it has begun."""
        path = self.folder / f"rank-{self.first + local}"
        return path.read_text() if path.is_file() else ""

    def _forward(self, local: int) -> None:
        came = list(self.came)
        path = self.folder / f"rank-{self.first + local}"
        if self._sent[local] == len(came) or not (is_held(path) and self._file(local)):
            return
        for number in came[self._sent[local] :]:
            with suppress(ProcessLookupError):
                self.processes[local].send_signal(number)
        self._sent[local] = len(came)

    def _ending(self, local: int) -> Ended:
        rank, code = self.first + local, self._code(local)
        if code is None and self._file(local).endswith("done"):
            code = 0
        report = read_report(self._report(rank)) if code != 0 else None
        if report is None:
            return Ended(rank=rank, code=code, fault=rank, message="", trace="", time=0.0, retry=True)
        # One that reports why and hangs in its end has failed of what it reports.
        return Ended(rank=rank, code=1 if code is None else code, fault=report.rank, message=report.message,
                     trace=report.trace, time=report.time, retry=report.retry)  # fmt: skip

    def end(self) -> None:
        """Kill what is left, with its children, and clear up."""
        self.ended = True
        for process in self.processes:
            if process.poll() != 0:
                _kill(process)
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(KILLED_S)
        self._lock.close()
        if self._port:
            self._port.close()
        shutil.rmtree(self.folder, ignore_errors=True)
