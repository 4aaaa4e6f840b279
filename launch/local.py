"""`launch.local=N`: N ranks of one run on this machine, through torchrun's elastic agent.

This process starts the agent (`python -m torch.distributed.run`), and the agent the ranks, which run the same command
again and know from RANK that they are ranks (`launch/rank.py`). It imports no torch.

Output: that of rank 0 goes where this process writes, that of the others to RUN/logs/rank-N.log, the agent's own to
RUN/logs/torchrun.log. What a rank failed of is printed once, as `vidit: rank 2: ...`.

Over several nodes, one such process a node, the agents meet at MASTER_ADDR (`launch/srun.py`).

Signals: the agent would give ranks 30 s after SIGTERM, die of SIGUSR1 and call either a failure. So it gets neither:
SIGTERM, SIGUSR1, SIGUSR2 and SIGINT to this process go from here to every rank, which save and leave as one process
does, in the time that they need. After a second SIGINT they leave at once, and the agent ends after 30 s those that do
not. Ranks whose launcher or agent is killed ask themselves to stop.
"""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from launch.rank import FOLDER, SIGNALS, is_held
from launch.srun import ALONE, Node
from parallel.failure import read_report

POLL_S = 0.1
STRAGGLERS_S = 30.0  # as the agent would give its workers
FAILURE = re.compile(r"rank +: (\d+) .*\n +exitcode +: (-?\d+) \(pid: (\d+)\)")
FORCED = re.compile(r"Unable to shutdown process (\d+) via .*, forcefully exiting")  # what SIGTERM did not end


@dataclass(frozen=True)
class Rendered:
    """A command line, and the environment that it needs besides the one that is there."""

    argv: tuple[str, ...]
    environment: dict[str, str]


def render(
    command: Sequence[str], num_ranks: int, folder: Path, environment: Mapping[str, str], num_cores: int,
    python: str = sys.executable, node: Node = ALONE,
) -> Rendered:  # fmt: skip
    """How `num_ranks` ranks of `command` are started on this node: what follows `python` for one process.

    `folder` is where this launch and its ranks leave word for each other. Each rank gets its share of the cores; how
    many threads and which warnings of c10d there are is left to the environment where it says so. Pure.
    """
    meet = ["--standalone", "--local-addr=127.0.0.1", "--nnodes=1"]
    if node.count > 1:
        meet = [f"--nnodes={node.count}", f"--node-rank={node.number}"]
        meet += [f"--master-addr={node.address}", f"--master-port={node.port}"]
    argv = (
        python, "-m", "torch.distributed.run", *meet, f"--nproc-per-node={num_ranks}", "--max-restarts=0",
        f"--log-dir={folder / 'torch'}", *command,
    )  # fmt: skip
    wanted = {
        FOLDER: str(folder),
        "OMP_NUM_THREADS": str(max(1, num_cores // num_ranks)),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # what c10d warns of when a rank dies says less than the error does
    }
    return Rendered(argv, {name: value for name, value in wanted.items() if name == FOLDER or name not in environment})


def run(command: Sequence[str], num_ranks: int, logs: Path, show_traceback: bool = False, node: Node = ALONE) -> int:
    """Start the ranks of this node, pass signals on, wait for them, print why one failed. Returns the exit code.

    0 when every rank ended well, after a request to stop too; else that of the rank at fault, 128 + N where
    signal N ended it.
    """
    logs.mkdir(parents=True, exist_ok=True)
    first = node.number * num_ranks
    with _folder() as folder, Forward() as forward:
        rendered = render(command, num_ranks, folder, os.environ, len(os.sched_getaffinity(0)), node=node)
        own_log = folder / "torchrun.log"  # not that of another launch, which may still run there
        with own_log.open("wb") as log:
            agent = subprocess.Popen(
                rendered.argv, env={**os.environ, **rendered.environment}, stdin=sys.stderr.fileno(), stderr=log,
                start_new_session=True, preexec_fn=_ignore_usr,
            )  # fmt: skip
        ranks = [Rank(folder / f"rank-{n}") for n in range(first, first + num_ranks)]
        while agent.poll() is None:
            forward.to(ranks, agent)
            time.sleep(POLL_S)
        _end_stragglers(ranks, forward, agent)
        shutil.copy(own_log, logs / (f"torchrun-{node.number}.log" if node.count > 1 else "torchrun.log"))
        if all(rank.is_done() for rank in ranks):
            return 0
        if forward.insists:
            sys.stderr.write("vidit: interrupted\n")
            return 130
        failure = find_failure(folder, own_log.read_text(errors="replace"), agent.returncode)
    _tell(failure, logs, show_traceback)
    return failure.code


def _ignore_usr() -> None:
    """In the agent, before it starts: SLURM sends SIGUSR1 to every process of a step, and it would die of it."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _folder() -> Iterator[Path]:
    """The folder of a launch, with the lock that shows the ranks that this process lives."""
    folder = Path(tempfile.mkdtemp(prefix="vidit-launch-"))
    try:
        with (folder / "launcher").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Rank:
    """A rank as the launcher sees it: the file that it locks while it lives, and how many signals it was sent."""

    file: Path
    num_sent: int = 0

    def process(self) -> int | None:
        """Its process, once it has begun and until it ends."""
        if not is_held(self.file):
            return None
        first = self.file.read_text().split("\n")[0]
        return int(first) if first else None

    def is_done(self) -> bool:
        """Whether it came to its end without an error."""
        return self.file.is_file() and self.file.read_text().endswith("done")


class Forward:
    """While entered, collects the signals that ask to stop; `to` sends every rank those that it has not had."""

    def __init__(self) -> None:
        self.came: list[int] = []
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Forward":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _take(self, number: int, _: FrameType | None) -> None:
        self.came.append(number)

    @property
    def insists(self) -> bool:
        """Whether Ctrl-C came twice: the ranks leave at once, or are ended."""
        return self.came.count(signal.SIGINT) > 1

    def to(self, ranks: Sequence[Rank], agent: "subprocess.Popen[bytes]") -> None:
        came = list(self.came)
        for rank in ranks:
            if rank.num_sent < len(came) and (process := rank.process()):
                for number in came[rank.num_sent :]:
                    _send(process, number)
                rank.num_sent = len(came)
        if self.insists:
            with suppress(ProcessLookupError):
                agent.terminate()


def _send(process: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)


def _end_stragglers(ranks: Sequence[Rank], forward: Forward, agent: "subprocess.Popen[bytes]") -> None:
    """Ranks outlive an agent that was killed: they have asked themselves to stop, and get time for it."""
    deadline = time.monotonic() + STRAGGLERS_S
    while left := [process for rank in ranks if (process := rank.process())]:
        if time.monotonic() > deadline:
            for process in left:
                _send(process, signal.SIGKILL)
        forward.to(ranks, agent)
        time.sleep(POLL_S)


class Failure(NamedTuple):
    """Why a launch failed: the rank at fault (None: none of them), the message, the exit code, the traceback."""

    rank: int | None
    message: str
    code: int
    trace: str


def find_failure(folder: Path, agent_log: str, agent_code: int) -> Failure:
    """The cause among all that the ranks reported and the agent saw: the first report, or a rank without one."""
    seen = FAILURE.findall(agent_log)
    codes = {int(rank): int(code) for rank, code, _ in seen}
    forced = {int(rank) for rank, _, process in seen if process in FORCED.findall(agent_log)}
    paths = sorted(folder.glob("torch/*/attempt_*/*/error.json"))
    found = [(path.parent.name, report) for path in paths if (report := read_report(path))]
    # What a rank says of itself comes before what others say of it, and that in the order of time.
    reports = [report for _, report in sorted(found, key=lambda one: (one[0] != str(one[1].rank), one[1].time))]
    # A rank that a signal ended left no report; what the others say of it is who it was and what it did last.
    killed = [rank for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM]
    if reports:
        told = next((report for report in reports if report.rank in killed), reports[0])
        code = codes.get(told.rank, 1) if told.rank is not None else 1
        how = f"{_how(code)}: " if told.rank in killed else ""
        if told.rank in forced:
            how = "did not leave when asked, so it was killed: "
        return Failure(told.rank, how + told.message, _code(code), told.trace)
    for rank in [*killed, *codes]:
        return Failure(rank, f"{_how(codes[rank])} without a message", _code(codes[rank]), "")
    last = agent_log.strip().rpartition("\n")[2]
    return Failure(None, f"torchrun {_how(agent_code)}: {last or 'it said nothing'}", _code(agent_code) or 1, "")


def _how(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _code(code: int) -> int:
    """As a shell would give it."""
    return 128 - code if code < 0 else code


def _tell(failure: Failure, logs: Path, show_traceback: bool) -> None:
    name = "rank-*" if failure.rank is None else f"rank-{failure.rank}"
    who = "" if failure.rank is None else f"rank {failure.rank}: "
    trace = failure.trace if show_traceback else ""
    sys.stderr.write(f"{trace}vidit: {who}{failure.message}\n  {logs / name}.log has more\n")
