"""Whether ranks that failed are worth another start: one decision, for every way of starting them.

What the user wrote wrong, and a step that fails the same way each time, would fail again, so those end the launch. What
the machine did (a rank killed, a cable, a hang, a disk) may be over: the ranks start again from the last checkpoint, as
long as there is a new one every `budget` failures.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from launch.ending import Ending

SAVED = re.compile(r"step-(\d{8,})")
INTERRUPTED = 130


class Decision(NamedTuple):
    """Whether to start again, and why, for the user."""

    again: bool
    why: str


@dataclass
class Restarts:
    """The failures in a row without a new checkpoint, of which `budget` are forgiven. `checkpoints` is the folder,
    `option` what the user sets the budget with.
    """

    budget: int
    checkpoints: Path
    option: str = "launch.max_restarts"
    in_a_row: int = 0
    saved: int = -1
    total: int = 0

    def begin(self) -> None:
        """The first start."""
        self.saved = newest_step(self.checkpoints)

    def decide(self, ending: Ending, stop_requested: bool) -> Decision:
        """After each failure, once."""
        saved = newest_step(self.checkpoints)
        self.in_a_row = 1 if saved > self.saved else self.in_a_row + 1
        self.saved = saved
        where = f"the checkpoint of step {saved}" if saved >= 0 else "the beginning"
        if stop_requested or ending.code == INTERRUPTED:
            return Decision(False, "a stop was asked for")
        if not ending.retry:
            return Decision(False, "it would fail again")
        if self.in_a_row > self.budget:
            return Decision(False, f"{self.in_a_row} failures since {where}")
        self.total += 1
        return Decision(True, f"starting again from {where}, {self.in_a_row} of {self.option}={self.budget}")


def newest_step(checkpoints: Path) -> int:
    """The step of the newest whole checkpoint; -1 without any."""
    if not checkpoints.is_dir():
        return -1
    names = [path.parent.name for path in checkpoints.glob("step-*/manifest.json")]
    return max((int(match[1]) for name in names if (match := SAVED.fullmatch(name))), default=-1)
