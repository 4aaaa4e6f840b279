"""The clips of a split that can be used: where each came from, which bucket it is in, and the order of both."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vidit.config import RunConfig
from vidit.data.buckets import Facts, assign, schedule_of
from vidit.data.order import ClipOrder
from vidit.data.schedule import Schedule
from vidit.data.shards import ClipRef

Dropped = list[tuple[str, str]]
"""Names of clips that cannot be used, and the reasons."""


@dataclass(frozen=True)
class Catalog:
    """Clips by number, with the number of the bucket and of the data set of each.

    `weights` are those of the data sets, `labels` what is put before a key to tell theirs apart: one empty text where
    there is one data set.
    """

    refs: Sequence[ClipRef]
    bucket: NDArray[np.int64]
    source: NDArray[np.int64]
    weights: tuple[float, ...] = (1.0,)
    labels: tuple[str, ...] = ("",)
    num_buckets: int = 1
    _orders: dict[tuple[int, str, int], ClipOrder] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def plain(cls, refs: Sequence[ClipRef]) -> "Catalog":
        """Clips of one data set and one bucket."""
        return cls(refs, np.zeros(len(refs), np.int64), np.zeros(len(refs), np.int64))

    def name(self, number: int) -> str:
        """What a clip is called in records."""
        return self.labels[self.source[number]] + self.refs[number].key

    def stream(self, what: str, bucket: int) -> str:
        """The name of a stream of a bucket, which keys its order."""
        return what if self.num_buckets == 1 else f"{what}/bucket {bucket}"

    @cached_property
    def shares(self) -> NDArray[np.float64]:
        """Of all rows, those of each bucket and data set: (buckets, data sets).

        A data set's weight is spread over the buckets as its clips are, so that weights hold for the run as a whole.
        """
        counts = np.zeros((self.num_buckets, len(self.weights)))
        np.add.at(counts, (self.bucket, self.source), 1)
        return counts / np.maximum(counts.sum(0), 1) * np.array(self.weights)

    def sources_of(self, bucket: int) -> list[int]:
        """The data sets that have clips in a bucket: the parts of its order."""
        return np.flatnonzero(self.shares[bucket]).tolist()

    def order(self, seed: int, what: str, bucket: int) -> ClipOrder:
        """The order of a bucket's clips."""
        key = seed, what, bucket
        if key not in self._orders:
            held = self.sources_of(bucket)
            parts = tuple(np.flatnonzero((self.bucket == bucket) & (self.source == source)) for source in held)
            weights = tuple(self.shares[bucket, held].tolist())
            self._orders[key] = ClipOrder(seed, self.stream(what, bucket), parts, weights)
        return self._orders[key]

    def schedule(self, config: RunConfig) -> Schedule:
        """Of a run on these clips. ValueError for a bucket without any."""
        return schedule_of(config, self.shares.sum(1).tolist())


def catalogue(sources: Sequence[Sequence[ClipRef]], config: RunConfig) -> tuple[Catalog, Dropped, list[str]]:
    """(clips long enough, those that are not with the reason, names of those whose picture is cropped).

    `sources` are the clips of each data set of `config.data.sources`, or of one other.
    """
    d, refs = config.data, [ref for source in sources for ref in source]
    source = np.repeat(np.arange(len(sources)), list(map(len, sources)))
    weights: tuple[float, ...] = (1.0,)
    labels: tuple[str, ...] = ("",)
    if len(sources) > 1:
        weights = tuple(one.weight for one in d.sources)
        labels = tuple(f"{one.name}/" for one in d.sources)
    shapes, frames = d.shapes, np.array([_available(ref, d.fps) for ref in refs], np.int64)
    width, height = (np.array([getattr(ref, side) for ref in refs], np.int64) for side in ("width", "height"))
    names = [labels[of] + ref.key for of, ref in zip(source.tolist(), refs, strict=True)]
    bucket = assign(Facts(names, frames, width, height), shapes, config.train.seed)
    least = min(shape.num_frames for shape in shapes)
    dropped = []
    for number in np.flatnonzero(bucket < 0).tolist():
        own = refs[number].fps
        at = f" are {frames[number]} at data.fps={d.fps:g} (its own rate is {own:g})" if d.fps else ""
        needed = f"the shortest of data.buckets has {least}" if d.buckets else f"data.num_frames={least}"
        dropped.append((names[number], f"{refs[number].num_frames} frames{at}; {needed}"))
    kept = np.flatnonzero(bucket >= 0)
    sizes = np.array([(shape.height, shape.width) for shape in shapes])[bucket[kept]]
    cut = kept[width[kept] * sizes[:, 0] != height[kept] * sizes[:, 1]] if len(kept) else kept
    catalog = Catalog([refs[i] for i in kept.tolist()], bucket[kept], source[kept], weights, labels, len(shapes))
    return catalog, dropped, [names[i] for i in cut.tolist()]


def _available(ref: ClipRef, fps: float) -> int:
    """Frames at the rate of the run, as the decoder counts, half a frame of grace included."""
    return int(ref.num_frames / ref.fps * fps + 0.5) if fps else ref.num_frames
