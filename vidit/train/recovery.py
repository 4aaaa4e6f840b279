"""What becomes of a step whose loss or gradient is not finite, or whose loss is a spike.

`train.on_nonfinite` and `train.on_spike` say it: stop; skip the update; or roll back, which goes back to an earlier
checkpoint and passes over every step from there to the faulty one (PaLM, 2204.02311, section 5.1). The order of clips
is a pure function of the step, so the loop goes on with the next step whatever was passed over, and a resume
needs nothing but the list of those steps, which is among the facts of every checkpoint. A verdict depends on numbers
that all ranks share, and so all take it alike.

A loss is a spike above median + factor x MAD of the losses before it: neither moves with a few outliers. MAD is taken
as at least 1 % of the median, or a loss that hardly moves would have spikes in its noise.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from vidit.config import Train

LEAST_LOSSES = 8  # of fewer nobody says what is usual
LEAST_SPREAD = 0.01  # of the median


class StepFaultError(RuntimeError):
    """A step that no update may be made of, and that ends the run. `rank` had such a loss, where one had."""

    rank: int | None = None
    retry = False  # the same step comes again, with the same loss


class NonFiniteError(StepFaultError):
    """The loss or the gradient is not finite; the update was not made."""


class SpikeError(StepFaultError):
    """The loss is a spike; the update was not made."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with a step, what it ends the run with, and what `train.on_...` wants done."""

    action: str
    reason: str
    error: StepFaultError


class Recovery:
    """The verdict over each step, and the memory that a resume needs for it; `facts` are those of its checkpoint."""

    def __init__(self, c: Train, facts: Mapping[str, Any]):
        self.c = c
        self.losses: deque[float] = deque(maxlen=c.spike_window)
        self.passed: list[list[int]] = []
        self.recovered: list[int] = []
        self.load(facts)
        self.recovered = [int(step) for step in facts.get("recovered", [])]

    def load(self, facts: Mapping[str, Any]) -> None:
        """Remember what a checkpoint does. What was recovered from since stays on the account."""
        self.losses = deque((float(loss) for loss in facts.get("losses", [])), maxlen=self.c.spike_window)
        self.passed = [[int(first), int(last)] for first, last in facts.get("passed", [])]

    def facts(self) -> dict[str, Any]:
        """For a checkpoint: losses of the last updates, steps without an update (first and last), recoveries."""
        losses = list(self.losses) if self.c.on_spike != "ignore" else []
        return {"losses": losses, "passed": self.passed, "recovered": self.recovered}

    def judge(self, step: int, loss: float, norm: float, finite: bool, keys: Sequence[str]) -> Fault | None:
        """What is wrong with a step before its update; None of a good one. `finite`: loss and gradient of all ranks."""
        at = f"at step {step}"
        if not finite:
            reason = f"loss {loss} and gradient norm {norm} {at}: not finite"
            cure = "Look at them, lower train.learning_rate, or resume with train.on_nonfinite=skip or roll_back"
            return Fault(self.c.on_nonfinite, reason, NonFiniteError(_text(reason, keys, cure)))
        limit = self.limit()
        if loss > limit:
            reason = f"loss {loss:.6g} {at}: a spike above {limit:.6g}, by train.spike_factor={self.c.spike_factor:g}"
            cure = "Look at them, raise train.spike_factor, or resume with train.on_spike=skip or roll_back"
            return Fault(self.c.on_spike, reason, SpikeError(_text(reason, keys, cure)))
        return None

    def limit(self) -> float:
        """The loss above which a step is a spike; infinite where none is looked for, or too few are known."""
        if self.c.on_spike == "ignore" or len(self.losses) < min(LEAST_LOSSES, self.c.spike_window):
            return math.inf
        middle = median(self.losses)
        spread = median(abs(loss - middle) for loss in self.losses)
        return middle + self.c.spike_factor * max(spread, LEAST_SPREAD * abs(middle))

    def charge(self, step: int, fault: Fault) -> None:
        """Put one recovery on the account; raises the fault's error where the run is to stop of it, or has used up
        `train.max_recoveries`.
        """
        if fault.action == "stop":
            raise fault.error
        recent = [past for past in self.recovered if past > step - self.c.recovery_window]
        if len(recent) >= self.c.max_recoveries:
            text = (
                f"{fault.error}. The run has recovered at steps {' '.join(map(str, recent))} already, and "
                f"train.max_recoveries={self.c.max_recoveries} in train.recovery_window={self.c.recovery_window} steps"
            )
            error = type(fault.error)(text)
            error.rank = fault.error.rank
            raise error
        self.recovered = [*recent, step]

    def updated(self, loss: float) -> None:
        """An update was made at this loss."""
        self.losses.append(loss)

    def passed_over(self, first: int, last: int) -> None:
        """No update is made of these steps."""
        self.passed.append([first, last])


def _text(reason: str, keys: Sequence[str], cure: str) -> str:
    return f"{reason}, no update made. Clips of the batch: {' '.join(keys)}. {cure}"
