"""`launch.local=N`: N ranks of one run on this machine.

This process starts the ranks, which run the same command again and know from RANK that they are ranks
(`launch/rank.py`). It imports no torch.

Output: that of rank 0 goes where this process writes, that of the others to RUN/logs/rank-N.log. What a rank failed of
is printed once, as `vidit: rank 2: ...`.

Over several nodes, one such process a node, the ranks meet at MASTER_ADDR (`launch/srun.py`).

Signals: SIGTERM, SIGUSR1, SIGUSR2 and SIGINT to this process go from here to every rank, which save and leave as one
process does, in the time that they need. After a second SIGINT they leave at once, and are killed after 30 s. Ranks
whose launcher is killed ask themselves to stop.

With `launch.max_restarts` a failure of a rank is followed by another start of all, from the last checkpoint, which meet
anew (`launch/restart.py` says when).
"""

import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from launch.ending import Ending, ending_of
from launch.node_ranks import NodeRanks
from launch.rank import SIGNALS
from launch.restart import Restarts
from launch.srun import ALONE, Node

LEAVE_S = 30.0


def variables_of(num_ranks: int, environment: Mapping[str, str], num_cores: int) -> dict[str, str]:
    """What each of `num_ranks` ranks is told besides its place: its share of the cores, and what c10d may say.

    What the environment says already is left to it. Pure.
    """
    wanted = {
        "OMP_NUM_THREADS": str(max(1, num_cores // num_ranks)),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # what c10d warns of when a rank dies says less than the error does
    }
    return {name: value for name, value in wanted.items() if name not in environment}


def run(
    command: Sequence[str],
    num_ranks: int,
    logs: Path,
    show_traceback: bool = False,
    node: Node = ALONE,
    restarts: Restarts | None = None,
) -> int:
    """Start the ranks of this node, pass signals on, wait for them, print why one failed. Returns the exit code.

    `command` is what follows `python`. 0 when every rank ended well, after a request to stop too; else that of the rank
    at fault, 128 + N where signal N ended it. Where `restarts` says so the ranks are started again after a failure, and
    meet anew.
    """
    logs.mkdir(parents=True, exist_ok=True)
    restarts = restarts or Restarts(0, logs)
    restarts.begin()
    with Forward() as forward:
        while True:
            ending = _run_once(command, num_ranks, logs, forward, node)
            if ending is None:
                return 0
            if forward.insists:
                sys.stderr.write("vidit: interrupted\n")
                return 130
            decision = restarts.decide(ending, stop_requested=bool(forward.came))
            _tell(ending, logs, show_traceback)
            if not decision.again:
                if restarts.budget:
                    sys.stderr.write(f"vidit: no other start: {decision.why}\n")
                return ending.code
            sys.stderr.write(f"vidit: {decision.why}\n")
            sys.stderr.flush()


def _run_once(command: Sequence[str], num_ranks: int, logs: Path, forward: "Forward", node: Node) -> Ending | None:
    """One start of all ranks of this node: None where each came to a good end."""
    first = node.number * num_ranks
    with _ranks(first, num_ranks, node.count * num_ranks) as ranks:
        meet = [node.address, str(node.port)] if node.count > 1 else ranks.meeting_point(node.address)
        outputs = [None if rank == 0 else str(logs / f"rank-{rank}.log") for rank in range(first, first + num_ranks)]
        variables = variables_of(num_ranks, os.environ, len(os.sched_getaffinity(0)))
        forward.to(ranks)
        ranks.start([sys.executable, *command], meet, variables, outputs)
        endings = ranks.wait(lambda: forward.to(ranks))
    return None if all(one["code"] == 0 for one in endings) else ending_of(endings)


@contextmanager
def _ranks(first: int, count: int, world: int) -> Iterator[NodeRanks]:
    ranks = NodeRanks(first, count, world, LEAVE_S)
    try:
        yield ranks
    finally:
        ranks.end()


class Forward:
    """While entered, collects the signals that ask to stop; `to` hands on those that ranks have not been sent."""

    def __init__(self) -> None:
        self.came: list[int] = []
        self._handed = 0
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

    def to(self, ranks: NodeRanks) -> None:
        while self._handed < len(self.came):
            ranks.ask(self.came[self._handed])
            self._handed += 1
        if self.insists:
            ranks.hurry()


def _tell(ending: Ending, logs: Path, show_traceback: bool) -> None:
    log = logs / f"rank-{'*' if ending.rank is None else ending.rank}.log"
    more = f"  {log} has more\n" if ending.rank is None or log.is_file() else ""
    trace = ending.trace if show_traceback else ""
    sys.stderr.write(f"{trace}vidit: {ending.who}{ending.message}\n{more}")
