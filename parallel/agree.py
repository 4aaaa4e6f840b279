"""One small collective a step, so that all ranks decide the same at the same step.

A signal, a clip that cannot be read or a loss that is not finite reaches one rank; a rank that acts on it alone
leaves the others waiting for ever. Each rank fills one row of a table of zeros with what it knows, the tables are
summed (one all-reduce), and all draw the same conclusions from the rows. The text of an error goes through the store,
only when there is one. A table, because no single maximum says who is slowest, by how much, and what the mean is;
8 bytes x (4 + sections) x ranks are no load. It travels over gloo, in host memory: no device is waited for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.failure import RankError, report_of
from parallel.ranks import Ranks

CALL, NONFINITE, STOP, ERROR = range(4)
HEAD = 4


@dataclass(frozen=True)
class Verdict:
    """What all ranks know after a step, the same on all but for `error`, which is a rank's own where it is its own.

    `nonfinite_ranks`: ranks whose loss was not finite. `stop`: some rank was asked to stop. `error`: what to raise.
    `slowest_rank` took `slowest_s` seconds of its own, most of them in `slowest_section`; a rank took `mean_s` on
    average, and `section_s` in each section.
    """

    nonfinite_ranks: tuple[int, ...]
    stop: bool
    error: BaseException | None
    slowest_rank: int
    slowest_section: str
    slowest_s: float
    mean_s: float
    section_s: Mapping[str, float]


class Agreement:
    """Draws the verdict of every step; `sections` are the parts of a step whose seconds are compared."""

    def __init__(self, ranks: Ranks, sections: Sequence[str]):
        self.ranks, self.sections, self.calls = ranks, tuple(sections), 0
        self._table = torch.zeros(ranks.world, HEAD + len(self.sections), dtype=torch.float64)

    def step(
        self, finite: bool, stop: bool, error: BaseException | None, seconds: Mapping[str, float]
    ) -> Verdict:  # fmt: skip
        """Give what this rank knows, get what all know. Every rank must call it equally often.

        `error` is one that only this rank has met, before it entered a collective that the others wait in; the
        caller raises `verdict.error` on all ranks, after what it wants to save. `seconds` by section should be those
        of work that waits for no other rank, or all ranks look equally slow. With one rank: no tensor, no waiting.
        """
        self.calls += 1
        spent = [seconds.get(section, 0.0) for section in self.sections]
        if self.ranks.store is None:
            own = () if finite else (0,)
            return self._verdict(own, stop, error, [spent])
        if error is not None:
            self.ranks.store.set(f"error/{self.calls}/{self.ranks.rank}", report_of(error, self.ranks.rank).message)
        row = [self.calls, not finite, stop, error is not None, *spent]
        self.ranks.heartbeat.next("agreement")  # who waits here waits for one that is not here yet
        self._table.zero_()
        self._table[self.ranks.rank] = torch.tensor(row, dtype=torch.float64)
        dist.all_reduce(self._table)
        rows = self._table.tolist()
        self._check_calls([int(r[CALL]) for r in rows])
        failed = [rank for rank, r in enumerate(rows) if r[ERROR]]
        if failed and error is None:
            text = self.ranks.store.get(f"error/{self.calls}/{failed[0]}").decode()
            error = RankError(failed[0], text)
        nonfinite = tuple(rank for rank, r in enumerate(rows) if r[NONFINITE])
        return self._verdict(nonfinite, any(r[STOP] for r in rows), error, [r[HEAD:] for r in rows])

    def _check_calls(self, calls: Sequence[int]) -> None:
        other = next((rank for rank, call in enumerate(calls) if call != self.calls), None)
        if other is not None:
            raise RuntimeError(
                f"rank {other} asks for agreement for the {calls[other]}th time, rank {self.ranks.rank} for the "
                f"{self.calls}th: the ranks do not go through the same steps"
            )

    def _verdict(
        self, nonfinite: tuple[int, ...], stop: bool, error: BaseException | None, spent: Sequence[Sequence[float]]
    ) -> Verdict:
        totals = [sum(row) for row in spent]
        slowest = totals.index(max(totals))
        section = max(self.sections, key=lambda s: spent[slowest][self.sections.index(s)], default="")
        means = [sum(column) / len(spent) for column in zip(*spent, strict=True)]
        return Verdict(
            nonfinite, stop, error, slowest, section, totals[slowest], sum(totals) / len(totals),
            dict(zip(self.sections, means, strict=True)),
        )  # fmt: skip
