"""Which micro-batches an optimizer step is made of, and which rank works on which: a pure function of numbers.

A micro-batch holds clips of one bucket, as many as cost about what one of any other bucket costs (`Schedule`), or is a
packed row (`vidit/data/packed.py`). The micro-batches of a step are the same for every number of ranks. A round is what
all ranks work on at the same time, and where weights or gradients are divided all wait for the slowest, so the
micro-batches of a step are sorted by cost before they are dealt: those of a round cost about the same.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from vidit.data.order import Shares, split_places

Stream = Literal["clips", "images"]


class Asked(NamedTuple):
    """Places of a stream of a bucket."""

    stream: Stream
    bucket: int
    places: range


@dataclass(frozen=True, kw_only=True)
class MicroBatch(ABC):
    """What one rank works on at a time; `rows` are its rows' numbers in the run."""

    rows: range
    step_rows: int
    """How many rows its step has, over all ranks."""
    round_rows: tuple[int, ...] = ()
    """The rows that all ranks work on at the same time."""

    @abstractmethod
    def asked(self, image_rows: int, images_per_row: int) -> Iterator[Asked]:
        """Which clips it is made of, in the order of its rows."""


@dataclass(frozen=True, kw_only=True)
class BucketBatch(MicroBatch):
    """Rows of one bucket; `number` counts its micro-batches from the start of the run."""

    bucket: int
    number: int

    def asked(self, image_rows: int, images_per_row: int) -> Iterator[Asked]:
        places, images = split_places(self.number, len(self.rows), image_rows)
        yield Asked("clips", self.bucket, places)
        if images:
            yield Asked("images", self.bucket, range(images.start * images_per_row, images.stop * images_per_row))


class Deal(ABC):
    """Micro-batches of a run, `per_step` to a step; which they are says a subclass."""

    per_step: int

    @property
    @abstractmethod
    def stride(self) -> int:
        """The numbers that are set aside for the rows of a step."""

    @abstractmethod
    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of an optimizer step (from 0), in the order of their places."""

    @abstractmethod
    def cost(self, of: MicroBatch) -> float:
        """What a micro-batch costs, in any unit."""

    def rounds(self, step: int, world: int) -> list[list[MicroBatch]]:
        """For each round of a step what each of `world` ranks works on, dearest round first."""
        return _rounds(self, step, world)

    def of_rank(self, index: int, rank: int, world: int) -> MicroBatch:
        """Micro-batch `index` of a rank, counted from the start of the run."""
        per_rank = self.per_step // world
        return self.rounds(index // per_rank, world)[index % per_rank][rank]

    def dealt(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step in the order in which any number of ranks works on them."""
        return sorted(self.step(step), key=self.cost, reverse=True)

    def imbalance(self, step: int, world: int) -> float:
        """What the step costs where every round waits for its slowest rank, over what it costs when dealt evenly."""
        rounds = self.rounds(step, world)
        waited = sum(max(map(self.cost, together)) for together in rounds)
        return waited * world / sum(self.cost(one) for together in rounds for one in together)


@dataclass(frozen=True)
class Schedule(Deal):
    """Micro-batches of one bucket each, dealt over the buckets by `shares`.

    `sizes` are the rows of a micro-batch of each bucket, `costs` what one row costs, in any unit.
    """

    shares: Shares
    per_step: int
    sizes: tuple[int, ...]
    costs: tuple[float, ...]

    @property
    def stride(self) -> int:
        return self.per_step * max(self.sizes)

    def step(self, step: int) -> list[MicroBatch]:
        dealt = [self.shares.at(step * self.per_step + i) for i in range(self.per_step)]
        total, first, found = sum(self.sizes[bucket] for bucket, _ in dealt), step * self.stride, list[MicroBatch]()
        for bucket, number in dealt:
            rows = range(first, first + self.sizes[bucket])
            found.append(BucketBatch(bucket=bucket, number=number, rows=rows, step_rows=total))
            first = rows.stop
        return found

    def cost(self, of: MicroBatch) -> float:
        assert isinstance(of, BucketBatch)
        return len(of.rows) * self.costs[of.bucket]


@functools.lru_cache(maxsize=8)
def _rounds(deal: Deal, step: int, world: int) -> list[list[MicroBatch]]:
    per_step = deal.per_step
    assert per_step % world == 0, f"{per_step} micro-batches a step on {world} ranks"
    ordered = deal.dealt(step)
    found = []
    for first in range(0, per_step, world):
        together = ordered[first : first + world]
        rows = tuple(row for one in together for row in one.rows)
        found.append([replace(one, round_rows=rows) for one in together])
    return found
