"""RUN/goodput.jsonl: where the wall time of a run went, over all of its starts, of those that were killed too.

Rank 0 appends a row at each save, at the end, and otherwise every few seconds: the seconds of this start so far by
section. A start is known by when its process began. `read_goodput` puts the starts together:

training     forward, backward, update and log of steps that are part of the run
data         waiting for batches
checkpoint   saving, as far as it keeps the loop waiting
review       validation and samples
startup      from the start of the process to the end of its first step, by part
lost         steps that were run again, since the checkpoint after them was not reached or the run rolled back
restart      between the last row of a start that failed and the process of the next: noticing, ending, starting

Goodput is the share of training in all of it. What lies between a stop that was asked for and the next start is
nobody's loss and is not counted.
"""

import json
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from vidit.whole_file import read_rows

if TYPE_CHECKING:
    from vidit.train.metrics import Reporter

GOODPUT = "goodput.jsonl"
EVERY_S = 2.0
ENDS = ("done", "stopped")
PARTS = ("training", "data", "checkpoint", "review", "startup", "lost", "restart")


def process_began() -> float:
    """When this process was started, in Unix time.

    Linux tells it in ticks since boot. The time of boot itself it tells in whole seconds, so that a sum of the two may
    lie before what happened a second earlier; here the process's age is taken from now.
    """
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return float(psutil.Process().create_time())
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])  # proc(5): starttime, the 22nd field
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


class Ledger:
    """The account of one start, of a process that began at a Unix time. It writes nothing before `keep`."""

    def __init__(self, began: float):
        self.path: Path | None = None
        self.began, self.resumed_at = began, 0
        self.startup: dict[str, float] = {}
        self.lost = 0.0
        self._until, self._written = began, 0.0
        self._kept: dict[int, float] = {}  # step -> seconds of training until then that are not lost

    def keep(self, run_dir: Path, step: int) -> None:
        """From here on it is written to the run directory, of a start that goes on from `step`."""
        self.path, self.resumed_at = run_dir / GOODPUT, step

    def started(self, part: str) -> None:
        """A part of the start is over: it has had all the time since the one before."""
        now = time.time()
        self.startup[part] = self.startup.get(part, 0.0) + now - self._until
        self._until = now

    def write(self, step: int, sections: Mapping[str, float], now: bool = True, end: str | None = None) -> None:
        """Tell of the loop's sections (Stopwatch.totals) so far; unless it must be `now`, at most every EVERY_S."""
        moment = time.time()
        if not now and moment - self._written < EVERY_S:
            return
        self._written = moment
        training = _training(sections)
        self._kept[step] = training - self.lost
        seconds = {"training": training} | {name: sections.get(name, 0.0) for name in ("data", "checkpoint", "review")}
        row: dict[str, Any] = {
            "start": self.began,
            "time": moment,
            "from": self.resumed_at,
            "step": step,
            "lost": self.lost,
        }
        if end is not None:
            row["end"] = end
        if self.path is not None:
            with suppress(OSError), self.path.open("a") as file:  # a full disk is for those to tell who need it
                file.write(json.dumps(row | {"lost": self.lost, "startup": self.startup, "seconds": seconds}) + "\n")

    def roll_back(self, step: int, sections: Mapping[str, float]) -> None:
        """What was trained since `step` is lost; all of this start, where an earlier one saved it."""
        self.lost = _training(sections) - self._kept.get(step, 0.0)
        self._kept = {at: kept for at, kept in self._kept.items() if at <= step}


def _training(sections: Mapping[str, float]) -> float:
    return sum(sections.get(name, 0.0) for name in ("compute", "update", "log"))


@dataclass
class Goodput:
    """Seconds of a run by part, its start-ups by theirs; `failures`: starts that had to be followed by another."""

    starts: int = 0
    failures: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    startup: dict[str, float] = field(default_factory=dict)
    lost_steps: int = 0

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """Of training in all."""
        return self.seconds["training"] / self.total_s if self.total_s else 0.0

    def line(self) -> str:
        """For the end of a run."""
        rest = ", ".join(f"{name} {s:.1f} s" for name, s in self.seconds.items() if name != "training" and s >= 0.05)
        starts = "1 start" if self.starts == 1 else f"{self.starts} starts"
        return f"goodput {self.share:.1%} of {self.total_s:.1f} s in {starts}" + (f"; {rest}" if rest else "")

    def table(self) -> Iterable[str]:
        """Every part with its share, for `vidit goodput`."""
        yield f"{self.starts} starts, {self.failures} failed, {self.lost_steps} steps lost, {self.total_s:.1f} s"
        for name, seconds in self.seconds.items():
            yield f"{name:12}{seconds:10.1f} s{seconds / max(self.total_s, 1e-9):8.1%}"
            if name == "startup":
                yield from (f"  {part:16}{s:4.1f} s" for part, s in self.startup.items())
        yield f"goodput {self.share:.1%}"


def read_goodput(run_dir: Path) -> Goodput:
    """Of all starts that are on record. ValueError where there are none."""
    rows = [row for row in read_rows(run_dir / GOODPUT) if "seconds" in row]
    if not rows:
        raise ValueError(f"{run_dir} holds no {GOODPUT}: no start of a run has got to its first step there")
    return add_up([list(group) for _, group in groupby(rows, key=lambda row: row["start"])])


def report_goodput(reporter: "Reporter", run_dir: Path, step: int) -> None:
    """At the end of a start, of all starts so far: a line and TensorBoard."""
    with suppress(ValueError):
        found = read_goodput(run_dir)
        reporter.say(found.line())
        reporter.scalars(step, {"goodput/share": found.share} | {f"goodput/{k}_s": v for k, v in found.seconds.items()})


def add_up(starts: list[list[dict[str, Any]]]) -> Goodput:
    """The rows of each start, in order, put together."""
    found = Goodput(starts=len(starts))
    for rows in starts:
        last = rows[-1]
        for name, seconds in last["seconds"].items():
            found.seconds[name] += seconds
        for part, seconds in last["startup"].items():
            found.startup[part] = found.startup.get(part, 0.0) + seconds
        found.seconds["lost"] += last["lost"]
        found.seconds["training"] -= last["lost"]
    found.seconds["startup"] = sum(found.startup.values())
    for rows, following in pairwise(starts):
        last, resumed_at = rows[-1], following[0]["from"]
        again = last["step"] - resumed_at
        if again > 0:
            lost = _kept(last) - max((_kept(row) for row in rows if row["step"] <= resumed_at), default=0.0)
            found.lost_steps += again
            found.seconds["lost"] += lost
            found.seconds["training"] -= lost
        if last.get("end") not in ENDS:
            found.failures += 1
            found.seconds["restart"] += max(0.0, following[0]["start"] - last["time"])
    return found


def _kept(row: Mapping[str, Any]) -> float:
    """Seconds of training until then that were not lost by then."""
    return float(row["seconds"]["training"]) - float(row["lost"])
