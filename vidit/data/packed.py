"""Packed rows: which clips of which buckets lie side by side in one sequence, under a limit of tokens.

The clips of a block of the stream, in numbers that the shares of the buckets fix, are put into as few rows as the limit
allows, and so that rows cost about the same: the dearest clip first, each into the cheapest row that has room for it.
What comes of it are patterns, how many clips of each bucket a row has. Every block has the same ones, shuffled by a
key, and takes the clips of each bucket in the order of that bucket: so which clip stands where stays a function of
numbers, each bucket goes through its epochs without a gap, and a step needs nothing of those before.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vidit import keys
from vidit.data.schedule import Asked, Deal, MicroBatch


@dataclass(frozen=True, kw_only=True)
class PackedRow(MicroBatch):
    """One sequence; `clips` are the buckets in it, each with the places of its clips in the order of that bucket."""

    clips: tuple[tuple[int, range], ...]
    cost: float

    def asked(self, image_rows: int, images_per_row: int) -> Iterator[Asked]:
        for bucket, places in self.clips:
            yield Asked("clips", bucket, places)


class Load(NamedTuple):
    """What fills a row: of each bucket how many clips a block holds, the tokens of a clip and what it costs."""

    counts: tuple[int, ...]
    tokens: tuple[int, ...]
    costs: tuple[float, ...]


@dataclass(frozen=True)
class PackedRows(Deal):
    """Packed rows of at most `limit` tokens, `per_step` to a step."""

    seed: int
    load: Load
    limit: int
    per_step: int

    @property
    def stride(self) -> int:
        return self.per_step * (self.limit // min(self.load.tokens))

    @property
    def fill(self) -> float:
        """Tokens of the rows over their limit, in the mean."""
        patterns = _patterns(self.load, self.limit)
        return float((patterns @ np.array(self.load.tokens)).mean()) / self.limit

    def step(self, step: int) -> list[MicroBatch]:
        """The dearest first, so that dealing them keeps the places of each bucket in order."""
        first = step * self.per_step
        rows = np.array([self._at(number)[0] for number in range(first, first + self.per_step)])
        costs = rows @ np.array(self.load.costs)
        place, number, found = self._at(first)[1], step * self.stride, list[MicroBatch]()
        for row in np.argsort(-costs, kind="stable"):
            end, numbers = place + rows[row], range(number, number + int(rows[row].sum()))
            clips = tuple((int(b), range(int(place[b]), int(end[b]))) for b in np.flatnonzero(rows[row]))
            found.append(PackedRow(clips=clips, cost=float(costs[row]), rows=numbers, step_rows=int(rows.sum())))
            place, number = end, numbers.stop
        return found

    def cost(self, of: MicroBatch) -> float:
        assert isinstance(of, PackedRow)
        return of.cost

    def _at(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of a row of the run: how many clips it has of each bucket, and how many of each stand before it."""
        patterns = _patterns(self.load, self.limit)
        block, place = divmod(number, len(patterns))
        order, before = _block(self.seed, block, self.load, self.limit)
        return patterns[order[place]], block * np.array(self.load.counts) + before[place]


@functools.lru_cache(maxsize=8)
def _block(seed: int, block: int, load: Load, limit: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(pattern at each place of a block, how many clips of each bucket stand before it in the block)."""
    patterns = _patterns(load, limit)
    order = keys.generator(seed, "packed rows", block).permutation(len(patterns))
    return order, np.cumsum(patterns[order], axis=0) - patterns[order]


@functools.lru_cache(maxsize=4)
def _patterns(load: Load, limit: int) -> NDArray[np.int64]:
    """How many clips of each bucket each row of a block has, (rows, buckets): as few rows as are found to do."""
    assert max(load.tokens) <= limit, f"a clip of {max(load.tokens)} tokens in rows of {limit}"
    total = sum(count * tokens for count, tokens in zip(load.counts, load.tokens, strict=True))
    num_rows = -(-total // limit)
    while (found := _filled(load, limit, num_rows)) is None:
        num_rows += max(1, num_rows // 100)
    return found


def _filled(load: Load, limit: int, num_rows: int) -> NDArray[np.int64] | None:
    """Those of so many rows; None where the clips do not fit."""
    patterns = np.zeros((num_rows, len(load.counts)), np.int64)
    used, cost = np.zeros(num_rows, np.int64), np.zeros(num_rows)
    for bucket in sorted(range(len(load.counts)), key=lambda b: (-load.costs[b], b)):
        for _ in range(load.counts[bucket]):
            row = int(np.where(used + load.tokens[bucket] <= limit, cost, np.inf).argmin())
            if used[row] + load.tokens[bucket] > limit:
                return None
            patterns[row, bucket] += 1
            used[row] += load.tokens[bucket]
            cost[row] += load.costs[bucket]
    return patterns
