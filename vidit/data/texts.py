"""Many short texts, such as the keys of a data set, as bytes end to end: 8 bytes a text beside its own.

Ten million Python strings take a gigabyte and a pass through all of them to be made; this is read from a mapped file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 16
"""Texts that are worked on at a time, so that what is made on the way stays small."""


@dataclass(frozen=True, eq=False)
class Texts:
    """UTF-8 texts; text i is ``content[ends[i - 1] : ends[i]]``."""

    content: NDArray[np.uint8]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, texts: Sequence[str]) -> Texts:
        parts = [text.encode("utf-8", "surrogatepass") for text in texts]
        ends = np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)), dtype=np.int64)
        return cls(np.frombuffer(b"".join(parts), np.uint8), ends)

    @classmethod
    def joined(cls, parts: Sequence[Texts]) -> Texts:
        shifts = np.cumsum([0] + [len(part.content) for part in parts])
        ends = [part.ends + shift for part, shift in zip(parts, shifts, strict=False)]
        none = cls.of(())
        return cls(
            np.concatenate([none.content, *(part.content for part in parts)]), np.concatenate([none.ends, *ends])
        )

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> str:
        start = self.ends[number - 1] if number else 0
        return self.content[start : self.ends[number]].tobytes().decode("utf-8", "surrogatepass")

    @property
    def starts(self) -> NDArray[np.int64]:
        return np.concatenate([np.zeros(min(1, len(self)), np.int64), self.ends[:-1]])

    def take(self, numbers: NDArray[np.int64] | range) -> Texts:
        """Those of these numbers; of a range without a copy of the bytes."""
        if isinstance(numbers, range):
            first = int(self.ends[numbers.start - 1]) if numbers.start else 0
            ends = self.ends[numbers.start : numbers.stop]
            return Texts(self.content[first : ends[-1] if len(ends) else first], ends - first)
        starts = np.where(numbers > 0, self.ends[numbers - 1], 0)
        sizes = self.ends[numbers] - starts
        ends = np.cumsum(sizes, dtype=np.int64)
        places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + sizes, sizes)
        return Texts(self.content[places], ends)

    def fault(self) -> int | None:
        """The number of a text that is empty, or where the bytes are not UTF-8 texts end to end; else None."""
        sizes = np.diff(self.ends, prepend=0)
        if len(self) and ((sizes < 1).any() or self.ends[-1] != len(self.content)):
            return int(np.argmax(sizes < 1))
        # A text that starts within a character: the whole may be valid where the parts are not.
        inside = (self.content[self.starts] & 0xC0) == 0x80
        if inside.any():
            return int(np.argmax(inside))
        try:
            self.content.tobytes().decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            return int(np.searchsorted(self.ends, error.start, "right"))
        return None

    def hashes(self, key: int) -> NDArray[np.uint64]:
        """64 bits of each text, keyed: equal texts have equal ones, others by chance. Not for those who mean harm."""
        found = [_mixed(words, key) for words in self._words()]
        return np.concatenate(found) if found else np.zeros(0, np.uint64)

    def repeated(self) -> tuple[int, int] | None:
        """The numbers of two texts that are the same, the second as low as can be and the first before it; or None."""
        hashes = self.hashes(0)
        ascending = np.sort(hashes)
        again = np.unique(ascending[1:][ascending[1:] == ascending[:-1]])
        if not len(again):
            return None
        first: dict[str, int] = {}
        for number in np.flatnonzero(np.isin(hashes, again)).tolist():
            if (other := first.setdefault(self[number], number)) != number:
                return other, number
        return None

    def _words(self) -> Iterator[NDArray[np.uint64]]:
        """The texts in chunks, each filled up with zeros to whole words of 8 bytes: (texts, words)."""
        for start in range(0, len(self), CHUNK):
            part = self.take(range(start, min(start + CHUNK, len(self))))
            sizes = np.diff(part.ends, prepend=0)
            filled = np.zeros((len(part), -(-int(sizes.max()) // 8) * 8), np.uint8)
            filled[np.arange(filled.shape[1]) < sizes[:, None]] = part.content
            yield filled.view("<u8")


def _mixed(words: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """A sum of the words by odd factors, to which zeros add nothing, and the finaliser of SplitMix64."""
    factors = np.random.Generator(np.random.Philox(key=key)).integers(0, 2**64, words.shape[1], np.uint64) | np.uint64(
        1
    )
    mixed = (words * factors).sum(1, dtype=np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)), np.uint64)
