"""Which rank does its own work slower than the others, and has done so for a while.

All ranks take equally long for a step, since each waits for the slowest. Own work is what a rank does between its
waits: the wall time from the start of a step until its batch is there and it waits for the others, the CPU seconds of
forward and backward (wall time there is mostly waiting, in every block of some layouts), the wall time of the update.
On an accelerator forward and backward are left out: a kernel that waits for another rank looks like one that works.
So a slow disk, loader or core is found everywhere, a slow GPU is not.
"""

from collections import deque
from dataclasses import dataclass
from statistics import fmean, median

from parallel.exchange import exchange

WINDOW = 50  # steps that the medians are over
LEAST_STEPS = 10
PARTS = ("data", "compute", "update")


@dataclass(frozen=True)
class Slowest:
    """The slowest rank, the seconds a step of its own work and of the median of the others, and where it loses most."""

    rank: int
    own_s: float
    others_s: float
    part: str
    mean_s: float

    @property
    def excess(self) -> float:
        """By which share it takes longer."""
        return self.own_s / self.others_s - 1 if self.others_s else 0.0

    def as_row(self) -> dict[str, float]:
        """For speed.jsonl."""
        return {"slowest_rank": self.rank, "own_s": self.own_s, "mean_own_s": self.mean_s}


class Stragglers:
    """Collects this rank's own seconds, and compares ranks by their medians."""

    def __init__(self, share: float):
        self.share, self.named = share, -1
        self.steps: deque[tuple[float, ...]] = deque(maxlen=WINDOW)

    def add(self, data_s: float, compute_s: float, update_s: float) -> None:
        """One step of this rank."""
        self.steps.append((data_s, compute_s, update_s))

    def compare(self) -> Slowest | None:
        """The slowest rank; None where there is one rank only, or no step yet. Collective."""
        own = [median(values) for values in zip(*self.steps, strict=True)]
        return slowest(exchange(own))

    def word(self, found: Slowest | None) -> str | None:
        """What to say of it, once for as long as it stays the same rank that is slow."""
        if found is None or len(self.steps) < LEAST_STEPS:
            return None
        if found.excess <= self.share:
            self.named = -1
            return None
        if found.rank == self.named:
            return None
        self.named = found.rank
        return (
            f"rank {found.rank} is slow: {found.own_s:.3g} s a step for its own work, {found.excess:.0%} more than the "
            f"other ranks ({found.others_s:.3g} s), most of it in {found.part}; median of {len(self.steps)} steps"
        )


def slowest(told: list[list[float]]) -> Slowest | None:
    """Of the medians that every rank tells, in the order of PARTS."""
    if len(told) < 2 or not all(told):
        return None
    sums = [sum(parts) for parts in told]
    rank = max(range(len(sums)), key=lambda r: sums[r])
    others = [parts for r, parts in enumerate(told) if r != rank]
    middle = [median(values) for values in zip(*others, strict=True)]
    lost = [mine - theirs for mine, theirs in zip(told[rank], middle, strict=True)]
    others_s = median(sum(parts) for parts in others)
    return Slowest(rank, sums[rank], others_s, PARTS[lost.index(max(lost))], fmean(sums))
