"""Which clip stands at which place: pure functions of (seed, data set), whatever ranks and workers there are.

Epoch e of n clips is one permutation, keyed by (seed, e), and place p of the endless stream is entry p mod n of
epoch p // n. Where several groups share a stream (data sets of a mixture, buckets of a run), `Shares` deals them by
blocks of fixed counts. Both answer in O(1): a run resumes at any place without reading what came before.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vidit import keys

BLOCK = 4096
MAX_SUBSTITUTES = 20
"""Clips that are tried in the place of one that cannot be used."""


def epoch_order(seed: int, stream: str, epoch: int, num_clips: int) -> NDArray[np.int64]:
    """The permutation of `num_clips` clips in one epoch."""
    return keys.generator(seed, "order", stream, epoch).permutation(num_clips)


def substitute(seed: int, place: int, attempt: int, num_clips: int) -> int:
    """The clip that stands in for one that does not decode: keyed, so that a resume finds the same."""
    return keys.key(seed, "substitute", place, attempt) % num_clips


def counts_of(shares: Sequence[float], block: int = BLOCK) -> tuple[int, ...]:
    """How often each group stands in a block of the stream: its share by largest remainder, at least once.

    A share is met to within one place of a block; groups of tiny shares make the block longer. ValueError for a share
    that is not above 0.
    """
    if not shares or min(shares) <= 0:
        raise ValueError(f"shares {list(shares)} must be above 0")
    total = float(sum(shares))
    exact = [share / total * block for share in shares]
    counts = [max(1, int(part)) for part in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: max(0, block - sum(counts))]:
        counts[i] += 1
    return tuple(counts)


@dataclass(frozen=True)
class Shares:
    """An endless stream of groups: each block of `sum(counts)` places holds group i `counts[i]` times, shuffled."""

    seed: int
    stream: str
    counts: tuple[int, ...]

    def at(self, place: int) -> tuple[int, int]:
        """(the group at a place, how often it stood before)."""
        if len(self.counts) == 1:
            return 0, place
        block, offset = divmod(place, sum(self.counts))
        groups, before = _block(self.seed, self.stream, block, self.counts)
        group = int(groups[offset])
        return group, block * self.counts[group] + int(before[offset])


@functools.lru_cache(maxsize=64)
def _block(seed: int, stream: str, block: int, counts: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(group at each place of a block, how often it stands before in the block)."""
    dealt = np.repeat(np.arange(len(counts)), counts)
    groups = keys.generator(seed, "shares", stream, block).permutation(dealt)
    by_group = np.argsort(groups, kind="stable")
    before = np.empty_like(groups)
    before[by_group] = np.concatenate([np.arange(count) for count in counts])
    return groups, before


class Stand(NamedTuple):
    """What stands at a place: the clip, and where that is in which epoch of which part."""

    part: int
    epoch: int
    offset: int
    clip: int


@dataclass(frozen=True)
class ClipOrder:
    """The order of the clips of one bucket, which come from one data set or are drawn from several by weight.

    `parts` are the numbers of the clips of each data set. One part is shuffled as a whole, epoch after epoch; of
    several each goes through its own epochs, at its share of the places.
    """

    seed: int
    stream: str
    parts: tuple[NDArray[np.int64] | range, ...]
    weights: tuple[float, ...] = (1.0,)
    _epochs: dict[int, tuple[int, NDArray[np.int64]]] = field(default_factory=dict, compare=False, repr=False)
    """The epoch that each part was last asked for: of large data sets a permutation is large."""

    @functools.cached_property
    def shares(self) -> Shares:
        return Shares(self.seed, f"{self.stream}/data sets", counts_of(self.weights))

    def at(self, place: int) -> int:
        """The number of the clip at a place of the endless stream."""
        return self.stand(place).clip

    def stand(self, place: int) -> Stand:
        """What stands at a place of the endless stream."""
        part, nth = self.shares.at(place)
        clips = self.parts[part]
        epoch, offset = divmod(nth, len(clips))
        if self._epochs.get(part, (-1,))[0] != epoch:
            stream = self.stream if len(self.parts) == 1 else f"{self.stream}/{part}"
            self._epochs[part] = epoch, epoch_order(self.seed, stream, epoch, len(clips))
        return Stand(part, epoch, offset, int(clips[self._epochs[part][1][offset]]))

    def instead(self, place: int, attempt: int) -> int:
        """The number of the clip that stands in for the one at a place: of the same bucket and data set."""
        clips = self.parts[self.shares.at(place)[0]]
        return int(clips[substitute(self.seed, place, attempt, len(clips))])


def split_places(number: int, rows: int, image_rows: int) -> tuple[range, range]:
    """Places in the stream of clips, and in that of image rows, of micro-batch `number`, counted in its bucket.

    The last `image_rows` of its `rows` hold images. Places count each stream without gaps, so that an epoch of clips
    leaves none out.
    """
    video_rows = rows - image_rows
    return (
        range(number * video_rows, (number + 1) * video_rows),
        range(number * image_rows, (number + 1) * image_rows),
    )
