"""A job: what is to be run, on how many nodes and devices, for how long. Every back-end starts from this description.

What a job runs is a command line, `command(task)`, that a person can read and run by hand: `vidit train` with the
config as it was named and the overrides as they were typed. Nothing of a job is a pickle. No torch here.
"""

from typing import Literal

from pydantic import Field, field_validator

from vidit.config import Section

Ranks = Literal["device", "node"]


class Task(Section):
    """One run of a job: a sweep has several, each with a run directory of its own."""

    overrides: tuple[str, ...] = ()
    run_dir: str = Field(description="absolute")


class JobSpec(Section):
    """A job of one run, or of one run for each override set of a sweep.

    `ranks` says who starts the processes of a node: `device` one process for each device, started by the back-end;
    `node` one process for each node, which starts the ranks there.
    """

    name: str = Field(min_length=1)
    config: str = Field(description="as `vidit train` takes it")
    tasks: tuple[Task, ...] = Field(min_length=1)
    nodes: int = Field(1, ge=1)
    min_nodes: int | None = Field(None, ge=1, description="with how many it may go on; None = only with all")
    devices: int = Field(1, ge=1, description="on each node; one rank each")
    minutes: int | None = Field(None, ge=1, description="time limit; None = that of the site")
    site: str = Field("", description="name in cluster/sites, or a path to a .toml; empty = none")
    address: str = Field("", description="of Ray's job server; empty = that of the site or of the environment")
    ranks: Ranks = "device"
    workdir: str = Field(description="where relative paths of the config start")
    python: str = Field(description="the interpreter, by its absolute path")
    after: tuple[str, ...] = Field((), description="jobs that must have ended well before")
    chain: int = Field(1, ge=1, description="how many jobs in a row train the run, each going on where one ended")
    restarts: int = Field(2, ge=0, description="failures in a row without a new checkpoint after which to start again")
    options: tuple[str, ...] = Field((), description="more options for the back-end's own submit command")

    @field_validator("name")
    @classmethod
    def _printable(cls, name: str) -> str:
        if not name.isprintable():
            raise ValueError("a job's name is one line of printable characters")
        return name

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.devices

    def overrides(self, task: Task) -> list[str]:
        """Those of a task, and what the job adds: where it writes, and how many ranks each process starts."""
        local = self.devices if self.ranks == "node" else 1
        return [*task.overrides, f"run_dir={task.run_dir}", f"launch.local={local}"]

    def command(self, task: Task) -> list[str]:
        """What each process of a task runs: one for each rank, or for each node."""
        return [self.python, "-m", "vidit.cli", "train", self.config, *self.overrides(task)]


def parse_minutes(text: str) -> int:
    """A time limit as SLURM writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].

    Rounded up to a minute. ValueError where it is none of these, or zero.
    """
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdecimal() for part in parts) or len(parts) > 3 or (dash and not days.isdecimal()):
        raise ValueError(f"time {text!r} is not a time limit; write minutes, 4:00:00 or 2-12:00:00")
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    total = (int(days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds
    if total == 0:
        raise ValueError(f"time {text!r} is no time at all; give at least a minute")
    return -(-total // 60)


def format_minutes(minutes: int) -> str:
    """As SLURM takes and shows it: days-hours:minutes:00."""
    days, rest = divmod(minutes, 24 * 60)
    return f"{days}-{rest // 60:02d}:{rest % 60:02d}:00" if days else f"{rest // 60:02d}:{rest % 60:02d}:00"
