"""What the driver of a job on Ray is told: its command line, written by the back-end and read by the driver.

Everything is words that a person can read in job.sh and type; nothing of it is a pickle.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

MODULE = "launch.ray_driver"
OUTPUT = "output-{}.log"
GIVEN = {"folder": "of the submission", "task": "its number in the job", "run_dir": "of the task",
         "nodes": "how many are wanted", "min_nodes": "with how many it may go on", "devices": "on each node",
         "device": "what Ray calls one", "cpus_per_device": "CPUs for each",
         "restarts": "failures in a row without a new checkpoint after which to start again",
         "wait_s": "for nodes", "settle_s": "for all nodes, where fewer will do", "grace_s": "to save and leave",
         "exports": "names of variables that every rank gets"}  # fmt: skip


@dataclass(frozen=True)
class Order:
    """One run on `nodes` nodes (at least `min_nodes`), `devices` ranks on each, all of which run `command`."""

    folder: Path
    task: int
    run_dir: Path
    nodes: int
    min_nodes: int
    devices: int
    device: str
    cpus_per_device: int
    restarts: int
    wait_s: float
    settle_s: float
    grace_s: float
    exports: tuple[str, ...]
    command: tuple[str, ...]

    @property
    def output(self) -> Path:
        """Where the driver and the first rank write."""
        return self.folder / OUTPUT.format(self.task)

    @property
    def bundle(self) -> dict[str, float]:
        """What one node has to have, in Ray's words."""
        cpus = float(self.devices * self.cpus_per_device)
        return {"CPU": cpus} if self.device == "CPU" else {"CPU": cpus, self.device: float(self.devices)}

    def words(self) -> list[str]:
        """The command line, without the interpreter."""
        given = {name: getattr(self, name) for name in GIVEN}
        given["exports"] = ",".join(self.exports)
        options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value != ""]
        return ["-m", MODULE, *options, "--", *self.command]


def parse(argv: Sequence[str] | None) -> Order:
    """The order that `words` wrote. Exits with 2 where something is missing, as argparse does."""
    top = argparse.ArgumentParser(prog=f"python -m {MODULE}", description="Train a run on Ray, and start it again.")
    kinds = {field.name: field.type for field in fields(Order)}
    for name, text in GIVEN.items():
        kind = kinds[name]
        option: Any = kind if kind in (int, float, str, Path) else lambda line: tuple(filter(None, line.split(",")))
        top.add_argument(f"--{name.replace('_', '-')}", type=option, help=text, required=name != "exports", default=())
    top.add_argument("command", nargs="+", help="what each rank runs, after --")
    arguments = vars(top.parse_args(argv))
    return Order(**{**arguments, "command": tuple(arguments["command"])})
