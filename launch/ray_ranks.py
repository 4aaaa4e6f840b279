"""The ranks of one node, started by an actor of Ray: ordinary processes that run `vidit train`.

A rank is a process of its own, so it handles signals, dies and is killed as it does anywhere, and Ray's death of an
actor and the death of a rank are seen apart. The actor is to its ranks what `launch/local.py` is (`launch/rank.py`
has the contract): it holds a lock in their folder, so ranks whose actor is gone ask themselves to stop.
"""

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

from launch.rank import FOLDER
from parallel.failure import read_report

POLL_S = 0.1
REPORT_S = 5.0  # what the others of a node get to say why, once one has failed
KILLED_S = 10.0


class Ended(TypedDict):
    """How a rank ended; `fault` is the rank that it blames, `code` None where it had to be killed."""

    rank: int
    fault: int | None
    code: int | None
    message: str


class NodeRanks:
    """`count` ranks of `world`, the first of them `first`. Methods may be called while `wait` waits.

    Values that cross between processes are numbers, strings, lists and dicts.
    """

    def __init__(self, first: int, count: int, world: int):
        self.first, self.count, self.world = first, count, world
        self.processes: list[subprocess.Popen[bytes]] = []
        self.asked = self.ended = False
        self.folder = Path(tempfile.mkdtemp(prefix="vidit-launch-"))
        self.lock = (self.folder / "launcher").open("w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)

    def meeting_point(self, address: str) -> list[str]:
        """Address and port at which the ranks can meet on this node, which Ray knows by `address`."""
        with socket.socket() as one:
            one.bind((address, 0))
            return [address, str(one.getsockname()[1])]

    def start(
        self, command: Sequence[str], workdir: str, meet: Sequence[str], output: str, variables: Mapping[str, str]
    ) -> None:
        """Start the ranks in `workdir`, unless a request to stop has come before."""
        if self.asked or self.ended:
            return
        with Path(output).open("ab") as out:
            for local in range(self.count):
                self.processes.append(
                    subprocess.Popen(
                        list(command), cwd=workdir, stdin=out, stdout=out, stderr=out, start_new_session=True,
                        env={**os.environ, **variables, **self._place(local, meet)},
                    )
                )  # fmt: skip
        if self.asked:
            self.stop()

    def _place(self, local: int, meet: Sequence[str]) -> dict[str, str]:
        """The variables of torchrun, which say where a rank stands; standard input is where rank 0 writes errors."""
        rank = self.first + local
        return {
            "RANK": str(rank), "WORLD_SIZE": str(self.world), "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(self.count), "MASTER_ADDR": meet[0], "MASTER_PORT": meet[1],
            FOLDER: str(self.folder), "TORCHELASTIC_ERROR_FILE": str(self._report(rank)),
        }  # fmt: skip

    def _report(self, rank: int) -> Path:
        return self.folder / f"error-{rank}.json"

    def wait(self) -> list[Ended]:
        """Return when all ranks have ended, or one has failed and the others of this node have had time to say so."""
        deadline = float("inf")
        while any(process.poll() is None for process in self.processes) and time.monotonic() < deadline:
            if deadline == float("inf") and any(process.poll() for process in self.processes):
                deadline = time.monotonic() + REPORT_S
            time.sleep(POLL_S)
        return [self._ending(self.first + local, process.poll()) for local, process in enumerate(self.processes)]

    def _ending(self, rank: int, code: int | None) -> Ended:
        report = read_report(self._report(rank)) if code else None
        if report:
            return Ended(rank=rank, fault=report.rank, code=code, message=report.message)
        how = f"ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
        return Ended(rank=rank, fault=rank, code=code, message="" if not code else f"{how} without a message")

    def stop(self) -> None:
        """Ask the ranks to save and leave."""
        self.asked = True
        for process in self.processes:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """Kill what is left, and clear up."""
        self.ended = True
        for process in self.processes:
            process.kill()
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(KILLED_S)
        self.lock.close()
        shutil.rmtree(self.folder, ignore_errors=True)
