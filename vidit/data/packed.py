"""Packed rows: which clips of which buckets lie side by side in one sequence, under a limit of tokens.

The clips of a block of the stream, in numbers that the shares of the buckets fix, are put into rows by one rule: the
dearest clip first, each into the cheapest row that has room for it. There are as few rows as the rule gets by with, no
empty ones, and they cost about the same unless the limit lets no clip stand beside the large ones. What comes of it
are patterns, how many clips of each bucket a row has. Every block has the same ones, shuffled by a key, and takes the
clips of each bucket in the order of that bucket: so which clip stands where stays a function of numbers, each bucket
goes through its epochs without a gap, and a step needs nothing of those before.
"""

import functools
import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vidit import keys
from vidit.data.schedule import Asked, Deal, MicroBatch

FEWEST_ROWS = 32
"""Rows of a block that is not lengthened: the last of so many, however empty, hardly counts."""


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

    @property
    def total(self) -> int:
        """Tokens of a block."""
        return sum(count * tokens for count, tokens in zip(self.counts, self.tokens, strict=True))

    def lengthened(self, limit: int) -> "Load":
        """As many such blocks in one as have the tokens of `FEWEST_ROWS` full rows."""
        times = -(-FEWEST_ROWS * limit // self.total)
        return self._replace(counts=tuple(count * times for count in self.counts))

    def fewest(self, limit: int) -> int:
        """A number of rows that no packing can do with less of: for the tokens, and for the clips of each size.

        A row has room for limit // t clips of t tokens or more.
        """
        by_size = (
            -(-sum(count for count, tokens in zip(self.counts, self.tokens, strict=True) if tokens >= size) // held)
            for size, held in ((size, limit // size) for size in self.tokens)
        )
        return max(-(-self.total // limit), *by_size)


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

    @property
    def clips_per_row(self) -> float:
        """In the mean."""
        return float(_patterns(self.load, self.limit).sum(axis=1).mean())

    def fuller(self, share: float) -> "PackedRows":
        """The same at the next limit, in whole clips of the largest bucket, that fills rows to a `share` up to 0.9.

        There always is one: where a clip found no room all rows but one lack less than the largest clip, so at m such
        clips a row and n rows at least (1 - 1/n) (1 - 1/m) is filled, which is above 0.9 from m = 15 on.
        """
        largest = max(self.load.tokens)
        limits = itertools.count(-(-self.limit // largest) * largest, largest)
        return next(rows for limit in limits if (rows := replace(self, limit=limit)).fill >= share)

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
        return patterns[order[place]], block * patterns.sum(axis=0) + before[place]


@functools.lru_cache(maxsize=8)
def _block(seed: int, block: int, load: Load, limit: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(pattern at each place of a block, how many clips of each bucket stand before it in the block)."""
    patterns = _patterns(load, limit)
    order = keys.generator(seed, "packed rows", block).permutation(len(patterns))
    return order, np.cumsum(patterns[order], axis=0) - patterns[order]


@functools.lru_cache(maxsize=4)
def _patterns(load: Load, limit: int) -> NDArray[np.int64]:
    """How many clips of each bucket each row of a block has, (rows, buckets); with one row less clips do not fit.

    Rows are tried in growing steps up to one a clip, which always do, then halved between the last two numbers.
    """
    assert max(load.tokens) <= limit, f"a clip of {max(load.tokens)} tokens in rows of {limit}"
    load = load.lengthened(limit)
    num_rows, most, step = load.fewest(limit), sum(load.counts), 1
    failed = num_rows - 1
    while (found := _filled(load, limit, num_rows)) is None:
        failed, num_rows, step = num_rows, min(most, num_rows + step), step * 2
    while len(found) - failed > 1:
        middle = (failed + len(found)) // 2
        if (fewer := _filled(load, limit, middle)) is None:
            failed = middle
        else:
            found = fewer
    assert found.any(axis=1).all(), f"of {len(found)} rows of {limit} tokens some have no clip of {load}"
    return found


def _filled(load: Load, limit: int, num_rows: int) -> NDArray[np.int64] | None:
    """Those of so many rows; None where the clips do not fit."""
    patterns = np.zeros((num_rows, len(load.counts)), np.int64)
    used, cost = np.zeros(num_rows, np.int64), np.zeros(num_rows)
    for bucket in sorted(range(len(load.counts)), key=lambda b: (-load.costs[b], b)):
        count, tokens, price = load.counts[bucket], load.tokens[bucket], load.costs[bucket]
        room = np.flatnonzero(used + tokens <= limit)
        # No clip goes past the `count` cheapest rows; sorted they are a heap already.
        cheapest = room[np.argsort(cost[room], kind="stable")[:count]]
        more = (limit - used[cheapest]) // tokens
        rows = list(zip(cost[cheapest].tolist(), cheapest.tolist(), more.tolist(), strict=True))
        for _ in range(count):
            if not rows:
                return None
            spent, row, fit = rows[0]
            patterns[row, bucket] += 1
            cost[row] = spent + price
            if fit > 1:
                heapq.heapreplace(rows, (spent + price, row, fit - 1))
            else:
                heapq.heappop(rows)
        used += patterns[:, bucket] * tokens
    return patterns
