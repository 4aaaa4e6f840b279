"""Buckets: the shapes a run is trained on, and which of them each clip goes to.

A clip goes to the bucket nearest to its aspect ratio, among those that it fills: long enough, and without being
enlarged. Of these it takes the largest and then the longest, or with chance 1 - `keep` the next one (Open-Sora 1.2's
multi-resolution training). With `data.longest_first` its length comes before its aspect ratio: it takes the longest
buckets that it fills, of these the nearest, of these the largest, and the next one is never farther from its aspect
ratio. Which one is keyed by the clip, so that it stays in its bucket over all epochs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vidit import keys
from vidit.batching import clip_tokens, micro_batch_rows, row_cost
from vidit.config import Bucket, RunConfig
from vidit.data.order import Shares, counts_of
from vidit.data.packed import Load, PackedRows
from vidit.data.schedule import Deal, Schedule
from vidit.data.texts import Texts

NEAR = 0.02  # aspect ratios whose logarithms differ by less count as the same


CHUNK = 1 << 17
"""Clips that are looked at together: what is made on the way is a table of clips and buckets."""


@dataclass(frozen=True, eq=False)
class Facts:
    """What decides a clip's bucket, one entry a clip of one data set; `frames` at the rate of the run."""

    keys: Texts
    frames: NDArray[np.int64]
    width: NDArray[np.int64]
    height: NDArray[np.int64]
    label: str = ""
    """What tells the clips of one data set of a mixture from those of another with the same keys."""
    settled: NDArray[np.bool_] | None = None
    """Clips that were cut to one of the buckets already, which chance does not move."""

    def part(self, clips: range) -> "Facts":
        frames, width, height = (each[clips.start : clips.stop] for each in (self.frames, self.width, self.height))
        settled = None if self.settled is None else self.settled[clips.start : clips.stop]
        return Facts(self.keys.take(clips), frames, width, height, self.label, settled)


def schedule_of(config: RunConfig, row_shares: Sequence[float]) -> Deal:
    """The micro-batches of a run, given the share of its rows of each bucket; ValueError for a bucket without any."""
    c, shapes = config, config.data.shapes
    sizes = micro_batch_rows(c)
    for shape, share in zip(shapes, row_shares, strict=True):
        if not share:
            raise ValueError(
                f"no clip goes to the bucket of {shape.num_frames} frames of {shape.height}x{shape.width}; "
                + ", or ".join(_cures(shape, shapes, c.data.longest_first))
            )
    costs = tuple(row_cost(c, shape) for shape in shapes)
    if c.data.packed_tokens:
        counts = counts_of([share * shape.weight for share, shape in zip(row_shares, shapes, strict=True)])
        load = Load(counts, tuple(clip_tokens(c, shape) for shape in shapes), costs)
        return PackedRows(c.train.seed, load, c.data.packed_tokens, c.train.global_batch)
    shares = [share / size * shape.weight for share, size, shape in zip(row_shares, sizes, shapes, strict=True)]
    dealt = Shares(c.train.seed, "buckets", counts_of(shares))
    return Schedule(dealt, c.train.global_batch // c.train.micro_batch, sizes, costs)


def _cures(empty: Bucket, shapes: Sequence[Bucket], longest_first: bool) -> list[str]:
    """What helps a bucket without clips: of what may take them first, only what the list holds is named."""

    def ahead(other: Bucket) -> bool:
        length, size = other.num_frames - empty.num_frames, other.height * other.width - empty.height * empty.width
        near = abs(math.log(other.width * empty.height / (other.height * empty.width))) <= 2 * NEAR
        if longest_first:
            return length > 0 or (near and length == 0 and size > 0)
        return near and (size > 0 or (size == 0 and length > 0))

    cures = ["leave it out of data.buckets"]
    if any(map(ahead, shapes)):
        cures.append(f"lower `keep` of the {'longer or larger' if longest_first else 'larger or longer'} ones")
    if not longest_first and any(other.num_frames < empty.num_frames for other in shapes):
        cures.append("set data.longest_first=true, which a list of `vidit data shapes` is made for")
    return cures


def assign(facts: Facts, buckets: Sequence[Bucket], seed: int, longest_first: bool = False) -> NDArray[np.int64]:
    """The bucket of each clip; -1 for a clip that is too short for every one."""
    num = len(facts.frames)
    parts = (facts.part(range(start, min(start + CHUNK, num))) for start in range(0, num, CHUNK))
    return np.concatenate([np.zeros(0, np.int64), *(_assigned(part, buckets, seed, longest_first) for part in parts)])


def _assigned(facts: Facts, buckets: Sequence[Bucket], seed: int, longest_first: bool) -> NDArray[np.int64]:
    ranked, drawn = _ranked(facts, buckets, longest_first), _drawn(facts, buckets, seed)
    if facts.settled is not None:
        drawn[facts.settled] = 0
    keep, number = np.array([bucket.keep for bucket in buckets]), np.arange(len(ranked))
    found = np.full(len(ranked), -1)
    for place in range(len(buckets)):
        candidate = ranked[:, place]
        is_last = ranked[:, place + 1] < 0
        taken = (found < 0) & (candidate >= 0) & (is_last | (drawn[number, candidate] < keep[candidate]))
        found[taken] = candidate[taken]
    return found


def _drawn(facts: Facts, buckets: Sequence[Bucket], seed: int) -> NDArray[np.float64]:
    """One number in [0, 1) for each clip and bucket; 0 where every clip is kept anyway."""
    drawn = np.zeros((len(facts.frames), len(buckets)))
    for i, bucket in enumerate(buckets):
        if bucket.keep < 1:
            bits = facts.keys.hashes(keys.key(seed, "bucket", i, facts.label))
            drawn[:, i] = (bits >> np.uint64(11)) / 2.0**53
    return drawn


def _ranked(facts: Facts, buckets: Sequence[Bucket], longest_first: bool) -> NDArray[np.int64]:
    """The buckets of each clip in the order in which it would take them, -1 behind the last: (clips, buckets + 1)."""
    sizes = np.array([(b.num_frames, b.height, b.width) for b in buckets], np.float64)
    long_enough = facts.frames[:, None] >= sizes[None, :, 0]
    enlarged = (facts.width[:, None] < sizes[None, :, 2]) | (facts.height[:, None] < sizes[None, :, 1])
    fits = long_enough & ~enlarged
    # A clip smaller than every bucket is enlarged as little as can be, not left out.
    none = ~fits.any(axis=1) & long_enough.any(axis=1)
    pixels = sizes[:, 1] * sizes[:, 2]
    smallest = np.where(long_enough, pixels[None], np.inf).min(axis=1, initial=np.inf)
    fits[none] = long_enough[none] & (pixels[None] == smallest[none, None])
    aspect = np.log(facts.width / facts.height)
    off = np.abs(aspect[:, None] - np.log(sizes[:, 2] / sizes[:, 1])[None])
    off = np.where(fits, off, np.inf)
    fits &= off <= _nearest(off, sizes[:, 0] if longest_first else np.zeros(len(sizes))) + NEAR
    by_size, by_length = -pixels, -sizes[:, 0]
    order = np.lexsort((by_size, by_length) if longest_first else (by_length, by_size))  # by the last of them first
    ranked = np.full((len(fits), len(buckets) + 1), -1)
    filled = np.zeros(len(fits), np.int64)
    for bucket in order:
        rows = fits[:, bucket]
        ranked[rows, filled[rows]] = bucket
        filled[rows] += 1
    return ranked


def _nearest(off: NDArray[np.float64], lengths: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far the nearest bucket is from a clip's aspect ratio, of those of each bucket's length or of more.

    Takes and gives (clips, buckets); infinite `off` where a clip does not fill a bucket.
    """
    bound, allowed = np.full((len(off), 1), np.inf), np.empty_like(off)
    for length in np.unique(lengths)[::-1]:
        alike = lengths == length
        bound = np.minimum(bound, off[:, alike].min(axis=1, keepdims=True))
        allowed[:, alike] = bound
    return allowed
