"""Clips as a sequence that is not there: a ``ClipRef`` is made when it is asked for.

A slice, a selection by numbers and a chain of lists are lists of the same kind, which hold numbers of rows: 8 bytes a
clip, or none where the rows follow one another. What is pickled, for a worker process, is the path of the mapped file
and a bit a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, groupby, pairwise
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from vidit.data.clip_ref import IN_INDEX, ClipRef
from vidit.data.columns import Columns
from vidit.data.storage import File, Folder
from vidit.data.texts import Texts

Rows = range | NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Table:
    """The clips of a data set in the order of its shards: ``starts`` are the first row of each, and the end."""

    shards: tuple[File, ...]
    starts: NDArray[np.int64]
    columns: Columns
    allow_empty_captions: bool = False

    def ref(self, row: int) -> ClipRef:
        shard = self.shards[int(np.searchsorted(self.starts, row, "right")) - 1]
        return ClipRef(shard, **self.columns.row(row), allow_empty_caption=self.allow_empty_captions)

    def shard_numbers(self, rows: Rows) -> NDArray[np.int64]:
        """The number of the shard of each row."""
        if isinstance(rows, range):
            inside = np.clip(self.starts, rows.start, rows.stop)
            return np.repeat(np.arange(len(self.shards)), np.diff(inside))
        return np.asarray(np.searchsorted(self.starts, rows, "right") - 1, np.int64)


@dataclass(frozen=True, eq=False)
class Part:
    """Some rows of one table; a range has step 1."""

    table: Table
    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> NDArray[Any]:
        array = self.table.columns.arrays[name]
        return array[self.rows.start : self.rows.stop] if isinstance(self.rows, range) else array[self.rows]

    @property
    def keys(self) -> Texts:
        return self.table.columns.keys.take(self.rows)

    def taken(self, numbers: NDArray[np.int64]) -> Part:
        if len(numbers) and (np.diff(numbers) == 1).all():
            return Part(self.table, self.rows[int(numbers[0]) : int(numbers[-1]) + 1])
        rows = numbers + self.rows.start if isinstance(self.rows, range) else self.rows[numbers]
        return Part(self.table, rows)

    def __reduce__(self) -> tuple[Any, ...]:
        rows = self.rows
        if isinstance(rows, range) or not len(rows) or (np.diff(rows) <= 0).any():
            return Part, (self.table, rows)
        bits = np.zeros(rows[-1] + 1 - rows[0], bool)
        bits[rows - rows[0]] = True
        return _unpacked, (self.table, int(rows[0]), np.packbits(bits))


def _unpacked(table: Table, first: int, bits: NDArray[np.uint8]) -> Part:
    return Part(table, np.flatnonzero(np.unpackbits(bits)) + first)


class Clips(Sequence[ClipRef]):
    """Clips of one table, or of several after one another."""

    def __init__(self, parts: Sequence[Part] = ()) -> None:
        self.parts = tuple(part for part in parts if len(part))
        self._starts = np.array([0, *accumulate(map(len, self.parts))])

    @classmethod
    def of(cls, refs: Sequence[ClipRef]) -> Clips:
        """These clips, as they are if they are of this kind."""
        if isinstance(refs, Clips):
            return refs
        parts = []
        for allow_empty, group in groupby(refs, lambda ref: ref.allow_empty_caption):
            shards = [(shard, list(of)) for shard, of in groupby(group, lambda ref: ref.shard_path)]
            starts = np.array([0, *accumulate(len(of) for _, of in shards)])
            columns = Columns.of([{name: getattr(ref, name) for name in IN_INDEX} for _, of in shards for ref in of])
            table = Table(tuple(shard for shard, _ in shards), starts, columns, allow_empty)
            parts.append(Part(table, range(len(columns))))
        return cls(parts)

    @classmethod
    def chained(cls, lists: Sequence[Sequence[ClipRef]]) -> Clips:
        """The clips of several lists, one after another."""
        return cls([part for one in lists for part in cls.of(one).parts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, number: int) -> ClipRef: ...
    @overload
    def __getitem__(self, number: slice) -> Clips: ...
    def __getitem__(self, number: int | slice) -> ClipRef | Clips:
        if isinstance(number, slice):
            return self._sliced(range(len(self))[number])
        place = range(len(self))[number]  # counts from the end, and IndexError
        part = int(np.searchsorted(self._starts, place, "right")) - 1
        return self.parts[part].table.ref(int(self.parts[part].rows[place - int(self._starts[part])]))

    def __iter__(self) -> Iterator[ClipRef]:
        return (part.table.ref(int(row)) for part in self.parts for row in part.rows)

    def __eq__(self, other: object) -> bool:
        """With any sequence of the same clips."""
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(ClipRef.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return Clips, (self.parts,)

    def take(self, numbers: NDArray[np.int64]) -> Clips:
        """The clips of these numbers, in this order; ascending ones stay few parts."""
        of = np.searchsorted(self._starts, numbers, "right") - 1
        cuts = [0, *(np.flatnonzero(np.diff(of)) + 1).tolist(), len(numbers)]
        pieces = [(numbers[start:end], int(of[start])) for start, end in pairwise(cuts) if end > start]
        return Clips([self.parts[part].taken(piece - self._starts[part]) for piece, part in pieces])

    def column(self, name: str) -> NDArray[Any]:
        """A column of ``vidit.data.columns.DTYPES``, but for the suffixes, whose numbers differ by table."""
        found = [part.column(name) for part in self.parts]
        return found[0] if len(found) == 1 else np.concatenate(found) if found else np.zeros(0)

    def ends_in(self, suffix: str) -> NDArray[np.bool_]:
        """Of which clips the video, or what is in its place, has this suffix."""
        found = [part.column("video_suffix") == part.table.columns.number_of(suffix) for part in self.parts]
        return np.concatenate([np.zeros(0, bool), *found])

    def folders_with(self, suffix: str) -> list[Folder]:
        """The folders that such clips lie in, in the order in which they are met."""
        found: dict[Folder, None] = {}
        for part in self.parts:
            hits = part.column("video_suffix") == part.table.columns.number_of(suffix)
            for number in np.unique(part.table.shard_numbers(part.rows)[hits]).tolist():
                found[part.table.shards[number].parent] = None
        return list(found)

    @property
    def keys(self) -> Texts:
        found = [part.keys for part in self.parts]
        return found[0] if len(found) == 1 else Texts.joined(found)

    def key(self, number: int) -> str:
        """A key alone."""
        part = int(np.searchsorted(self._starts, number, "right")) - 1
        return self.parts[part].table.columns.keys[int(self.parts[part].rows[number - int(self._starts[part])])]

    def by_shard(self) -> Iterator[tuple[File, Clips]]:
        """Neighbours of one shard together, with the shard."""
        return chain.from_iterable(map(_shards_of, self.parts))

    def _sliced(self, numbers: range) -> Clips:
        if numbers.step != 1:
            return self.take(np.arange(numbers.start, numbers.stop, numbers.step))
        ends = zip(self.parts, self._starts.tolist(), strict=False)
        pieces = [(part, max(0, numbers.start - start), max(0, numbers.stop - start)) for part, start in ends]
        return Clips([Part(part.table, part.rows[first:last]) for part, first, last in pieces])


def _shards_of(part: Part) -> Iterator[tuple[File, Clips]]:
    of = part.table.shard_numbers(part.rows)
    cuts = [0, *(np.flatnonzero(np.diff(of)) + 1).tolist(), len(of)]
    for start, end in pairwise(cuts):
        yield part.table.shards[of[start]], Clips([Part(part.table, part.rows[start:end])])
