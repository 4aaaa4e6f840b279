"""How long a section of a step may take before it is said to hang: so many times the median step, at least a floor.

A fixed timeout that covers validation, a first compilation and a save on a busy file system is far too long for a step
of half a second that hangs. So only the sections that every step has are held to it, and those that do not, or that
do something for the first time, are neither measured nor limited here.
"""

import time
from collections import deque
from collections.abc import Callable
from statistics import median

TIMED = ("data", "agreement", "compute", "update")
LEAST_STEPS = 5  # of fewer the median says little
WINDOW = 64


class Deadline:
    """Is told of each section that begins. `factor` 0: there is no limit. `clock` gives seconds.

    `first_s` is the limit of a timed section as long as too few steps have been measured, but for the first step.
    """

    def __init__(
        self, factor: float, floor_s: float, first_s: float, clock: Callable[[], float] = time.monotonic
    ):  # fmt: skip
        self.factor, self.floor_s, self.first_s, self.clock = factor, floor_s, first_s, clock
        self.steps: deque[float] = deque(maxlen=WINDOW)
        self._began: float | None = None  # of a step all of whose sections so far are timed
        self._timed, self._seen, self._since = False, 0, clock()

    def enter(self, section: str) -> None:
        """A section begins; `data` is the first of a step."""
        now = self.clock()
        if section == "data":
            self._seen += 1
        if section not in TIMED or section == "data":
            if self._began is not None:
                self.steps.append(now - self._began)
            self._began = now if section == "data" else None
        self._since, self._timed = now, section in TIMED

    def excuse(self, seconds: float) -> None:
        """The whole process did not run for so long: that is no time of the section."""
        self._since += seconds
        if self._began is not None:
            self._began += seconds

    def limit_s(self) -> float | None:
        """How long the section may take that this process is in; None for as long as it likes."""
        steps = list(self.steps)
        if not self.factor or not self._timed:
            return None
        if len(steps) >= LEAST_STEPS:
            return max(self.floor_s, self.factor * median(steps))
        return self.first_s if self._seen > 1 else None

    def exceeded(self) -> tuple[float, float] | None:
        """(seconds in the section, limit) where that is too long."""
        limit, age = self.limit_s(), self.clock() - self._since
        return (age, limit) if limit is not None and age > limit else None
