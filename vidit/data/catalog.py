"""The clips of a split that can be used: where each came from, which bucket it is in, and the order of both."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidit.config import RunConfig
from vidit.data.buckets import Facts, assign, schedule_of
from vidit.data.clip_list import Clips
from vidit.data.listing import Listing
from vidit.data.order import ClipOrder
from vidit.data.schedule import Deal
from vidit.data.shards import ClipRef
from vidit.data.tar import LATENT_SUFFIX

Dropped = list[tuple[str, str]]
"""Names of clips that cannot be used, and the reasons."""
LeftOut = Listing[tuple[str, str]]
"""The same of as many as a data set may have."""


@dataclass(frozen=True)
class Catalog:
    """Clips by number, with the number of the bucket and of the data set of each.

    `weights` are those of the data sets, `labels` what is put before a key to tell theirs apart: one empty text where
    there is one data set.
    """

    refs: Sequence[ClipRef]
    bucket: NDArray[np.integer[Any]]
    source: NDArray[np.integer[Any]]
    weights: tuple[float, ...] = (1.0,)
    labels: tuple[str, ...] = ("",)
    num_buckets: int = 1
    _orders: dict[tuple[int, str, int], ClipOrder] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def plain(cls, refs: Sequence[ClipRef]) -> "Catalog":
        """Clips of one data set and one bucket."""
        none = np.broadcast_to(np.int16(0), len(refs))
        return cls(refs, none, none)

    def __reduce__(self) -> tuple[Any, ...]:
        """Without orders, and numbers only where there are several to tell apart: a worker process is sent this."""
        bucket, source = (
            numbers if several else None
            for numbers, several in ((self.bucket, self.num_buckets > 1), (self.source, len(self.weights) > 1))
        )
        return _catalog, (self.refs, bucket, source, self.weights, self.labels, self.num_buckets)

    def name(self, number: int) -> str:
        """What a clip is called in records."""
        key = self.refs.key(number) if isinstance(self.refs, Clips) else self.refs[number].key
        return self.labels[self.source[number]] + key

    @property
    def is_plain(self) -> bool:
        """Whether all clips are of one data set and one bucket."""
        return self.num_buckets == len(self.weights) == 1

    def stream(self, what: str, bucket: int) -> str:
        """The name of a stream of a bucket, which keys its order."""
        return what if self.num_buckets == 1 else f"{what}/bucket {bucket}"

    @cached_property
    def shares(self) -> NDArray[np.float64]:
        """Of all rows, those of each bucket and data set: (buckets, data sets).

        A data set's weight is spread over the buckets as its clips are, so that weights hold for the run as a whole.
        """
        if self.is_plain:
            return np.array([[1.0 if len(self.refs) else 0.0]])
        cells = self.bucket.astype(np.int64) * len(self.weights) + self.source
        counts = np.bincount(cells, minlength=self.num_buckets * len(self.weights)).reshape(self.num_buckets, -1)
        return counts / np.maximum(counts.sum(0), 1) * np.array(self.weights)

    def sources_of(self, bucket: int) -> list[int]:
        """The data sets that have clips in a bucket: the parts of its order."""
        return [int(source) for source in np.flatnonzero(self.shares[bucket])]

    def order(self, seed: int, what: str, bucket: int) -> ClipOrder:
        """The order of a bucket's clips."""
        key = seed, what, bucket
        if key not in self._orders:
            held = self.sources_of(bucket)
            parts: tuple[NDArray[np.int64] | range, ...] = (range(len(self.refs)),)
            if not self.is_plain:
                parts = tuple(np.flatnonzero((self.bucket == bucket) & (self.source == source)) for source in held)
            weights = tuple(self.shares[bucket, held].tolist())
            self._orders[key] = ClipOrder(seed, self.stream(what, bucket), parts, weights)
        return self._orders[key]

    def schedule(self, config: RunConfig) -> Deal:
        """Of a run on these clips. ValueError for a bucket without any."""
        return schedule_of(config, self.shares.sum(1).tolist())


def _catalog(
    refs: Sequence[ClipRef],
    bucket: NDArray[np.integer[Any]] | None,
    source: NDArray[np.integer[Any]] | None,
    weights: tuple[float, ...],
    labels: tuple[str, ...],
    num_buckets: int,
) -> Catalog:
    none = np.broadcast_to(np.int16(0), len(refs))
    return Catalog(
        refs, none if bucket is None else bucket, none if source is None else source, weights, labels, num_buckets
    )


def catalogue(sources: Sequence[Sequence[ClipRef]], config: RunConfig) -> tuple[Catalog, LeftOut, Listing[str]]:
    """(clips long enough, those that are not with the reason, names of those whose picture is cropped).

    `sources` are the clips of each data set of `config.data.sources`, or of one other.
    """
    d, refs = config.data, Clips.chained(sources)
    weights: tuple[float, ...] = (1.0,)
    labels: tuple[str, ...] = ("",)
    if len(sources) > 1:
        weights = tuple(one.weight for one in d.sources)
        labels = tuple(f"{one.name}/" for one in d.sources)
    facts = [facts_of(Clips.of(one), d.fps, label) for one, label in zip(sources, labels, strict=True)]
    bucket = np.concatenate([assign(one, d.shapes, config.train.seed, d.longest_first) for one in facts])
    source = np.repeat(np.arange(len(sources), dtype=np.int16), list(map(len, sources)))
    width, height = (np.concatenate([getattr(one, side) for one in facts]) for side in ("width", "height"))
    high, wide = (np.array([getattr(shape, side) for shape in d.shapes])[bucket] for side in ("height", "width"))
    cut = np.flatnonzero((width * high != height * wide) & (bucket >= 0))

    def name(number: int) -> str:
        return labels[source[number]] + refs.key(number)

    short = np.flatnonzero(bucket < 0)
    dropped = Listing((len(short), lambda i: (name(short[i]), _too_short(refs[int(short[i])], config))))
    cropped = Listing((len(cut), lambda i: name(cut[i])))
    kept = np.flatnonzero(bucket >= 0) if len(short) else slice(None)
    used = refs.take(kept) if isinstance(kept, np.ndarray) else refs
    num_buckets = len(d.shapes)
    if num_buckets == len(sources) == 1:
        return Catalog.plain(used), dropped, cropped
    catalog = Catalog(used, bucket[kept].astype(np.int16), source[kept], weights, labels, num_buckets)
    return catalog, dropped, cropped


def facts_of(refs: Clips, fps: float, label: str = "") -> Facts:
    """What decides the buckets of the clips of one data set, at a rate of the run or (0) their own."""
    frames, width, height = (refs.column(name).astype(np.int64) for name in ("num_frames", "width", "height"))
    if fps:
        # Frames at the rate of the run, as the decoder counts, half a frame of grace included.
        frames = (frames / refs.column("fps") * fps + 0.5).astype(np.int64)
    return Facts(refs.keys, frames, width, height, label, refs.ends_in(LATENT_SUFFIX))


def _too_short(ref: ClipRef, config: RunConfig) -> str:
    d = config.data
    at = f" are {int(ref.num_frames / ref.fps * d.fps + 0.5)} at data.fps={d.fps:g}" if d.fps else ""
    at += f" (its own rate is {ref.fps:g})" if d.fps else ""
    least = min(shape.num_frames for shape in d.shapes)
    needed = f"the shortest of data.buckets has {least}" if d.buckets else f"data.num_frames={least}"
    return f"{ref.num_frames} frames{at}; {needed}"
