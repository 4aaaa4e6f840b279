"""Buckets made of the clips themselves: every shape that the clips of a run have, under a limit of tokens.

`vidit data shapes` prints them. Of a data set the index alone is read.

A clip is cut to the longest length that the VAE can code, and its picture, where it has more tokens than the limit
allows, is scaled down in its own aspect ratio; sides are multiples of what a token, or the caller, asks for. Of the
sizes of about the nearest aspect ratio it takes the largest, by the rule by which clips are put into buckets
(`vidit/data/buckets.py`). The clips are put into the list as a run with `data.longest_first` does, and buckets that
stay empty are taken out, so a run on the same clips has clips for each; every clip has a bucket of its length but where
a shape was left out as rare. What comes of it is a list of buckets like any other: it can be read, changed and kept.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vidit.config import Bucket, ConfigError, RunConfig
from vidit.data.buckets import NEAR, Facts, assign
from vidit.data.catalog import facts_of
from vidit.data.clip_list import Clips
from vidit.data.curation.table import select_clips
from vidit.data.remote import Reach
from vidit.data.shards import ClipRef, read_index
from vidit.data.texts import Texts
from vidit.resolve import grid_of, latent_frames


@dataclass(frozen=True)
class Limits:
    """Most tokens and frames of a clip (0: as many as it has), and what sides are multiples of, in pixels (0: a token).

    Shapes of fewer than `share` of the clips are left out; their clips go to the next bucket that they fill.
    """

    tokens: int
    frames: int = 0
    side: int = 0
    share: float = 0.0


@dataclass(frozen=True)
class Shapes:
    """Buckets in which each has clips, and how many of the `clips` are in none, or in one shorter than they are."""

    buckets: list[Bucket]
    clips: int
    too_short: int
    cut: int

    def overrides(self) -> list[str]:
        """Of the config of a run on these clips."""
        listed = [bucket.model_dump(exclude_defaults=True) for bucket in self.buckets]
        return ["data.buckets=" + json.dumps(listed), "data.longest_first=true"]

    def remarks(self) -> list[str]:
        """What becomes of clips that do not keep their length, a line each."""
        least = min(bucket.num_frames for bucket in self.buckets)
        lines = [
            (self.too_short, f"left out: the shortest shape has {least} frames"),
            (self.cut, "cut shorter than their frames and --max-frames allow, by --max-tokens or --share"),
        ]
        return [f"of {self.clips} clips {count} are {why}" for count, why in lines if count]


def shapes_of_run(config: RunConfig, limits: Limits) -> Shapes:
    """Buckets for the clips of `data.train` or `data.mixture` that rules keep, those set apart for validation left out.

    Errors of `read_index`, `select_clips` and `native_shapes`.
    """
    d = config.data
    if d.streaming:
        raise ConfigError(["data.streaming=true knows no clip before it is read; pack the tars, or leave it out"])
    reach = Reach(d.cache_dir, d.cache_gib, d.stall_s, d.patience_s)
    sources: list[Sequence[ClipRef]] = [
        select_clips(read_index(source.path, reach), (*d.select, *source.select)).refs for source in d.sources
    ]
    if d.num_validation and not d.validation:
        sources = [refs[: max(0, len(refs) - d.num_validation)] for refs in sources]
    return native_shapes(config, [facts_of(Clips.of(refs), d.fps) for refs in sources], limits)


def native_shapes(config: RunConfig, facts: Sequence[Facts], limits: Limits) -> Shapes:
    """The shapes of the clips of some data sets, those of most clips first.

    ValueError for limits that no clip or no token fits, and where nothing is left.
    """
    sides = _sides(config, limits)
    if not any(len(own.frames) for own in facts):
        raise ValueError("there is no clip to take shapes from; give a data set, or fewer clips for validation")
    every = np.concatenate([np.stack((own.frames, own.width, own.height), axis=1) for own in facts])
    clips, counts = np.unique(every, axis=0, return_counts=True)
    buckets, place = _filled(_listed(config, limits, sides, clips, counts), clips)
    lengths = np.array([bucket.num_frames for bucket in buckets])
    own = np.array([_longest(config, limits, frames) for frames in clips[:, 0].tolist()])
    cut = (place >= 0) & (lengths[place] < own)
    return Shapes(buckets, len(every), int(counts[place < 0].sum()), int(counts[cut].sum()))


def _listed(
    config: RunConfig, limits: Limits, sides: tuple[int, int], clips: NDArray[np.int64], counts: NDArray[np.int64]
) -> list[Bucket]:
    """The shapes of enough of the clips: (clips, 3), their frames, width and height, and how many there are of each."""
    shortest = _shortest(config)
    found: Counter[tuple[int, int, int]] = Counter()
    for clip, count in zip(clips, counts, strict=True):
        frames, width, height = (int(number) for number in clip)
        if frames >= shortest:
            found[_native(config, limits, sides, frames, width, height)] += int(count)
    if not found:
        raise ValueError(
            f"the longest clip has {clips[:, 0].max()} frames, and the fewest that make whole tokens are {shortest}; "
            "give longer clips, or a smaller patch of frames"
        )
    kept = [shape for shape, count in found.most_common() if count >= limits.share * found.total()]
    if not kept:
        raise ValueError(
            f"none of {len(found)} shapes has {limits.share:g} of the {found.total()} clips; lower --share"
        )
    return [Bucket(num_frames=frames, height=height, width=width) for frames, height, width in kept]


def _filled(buckets: list[Bucket], clips: NDArray[np.int64]) -> tuple[list[Bucket], NDArray[np.int64]]:
    """The buckets that have clips once those without are gone, and which one each of the clips goes to; -1: none.

    Without a bucket clips may go elsewhere, which can empty another one: it is done until each has some. Every bucket
    keeps all of its clips, so neither keys nor the seed matter.
    """
    facts = Facts(Texts.of([""] * len(clips)), *clips.T)
    while True:
        place = assign(facts, buckets, seed=0, longest_first=True)
        used = set(place.tolist())
        if used.issuperset(range(len(buckets))):
            return buckets, place
        buckets = [bucket for i, bucket in enumerate(buckets) if i in used]


def _sides(config: RunConfig, limits: Limits) -> tuple[int, int]:
    """What height and width are multiples of; ValueError for limits that are none, or that nothing fits."""
    if not 0 <= limits.share <= 1:
        raise ValueError(f"--share {limits.share:g} is no share of the clips; give a number from 0 to 1")
    shortest = _shortest(config)
    if 0 < limits.frames < shortest:
        raise ValueError(f"--max-frames {limits.frames} is less than the {shortest} that make whole tokens; raise it")
    own = [config.vae.spatial_stride * patch for patch in config.denoiser.patch[1:]]
    for token in own if limits.side else ():
        if limits.side % token:
            legal = math.lcm(*own)
            raise ValueError(
                f"--side {limits.side} is not divisible by {token}, the pixels of a token (VAE stride "
                f"{config.vae.spatial_stride} x patch); use a multiple of {legal}"
            )
    height, width = (limits.side or token for token in own)
    least = math.prod(grid_of(config, shortest, height, width))
    if least > limits.tokens:
        what = f"{shortest} frames" if shortest > 1 else "a picture"
        raise ValueError(
            f"--max-tokens {limits.tokens} is less than the {least} of {what} of {height}x{width}; give {least} or more"
        )
    return height, width


def _shortest(config: RunConfig) -> int:
    """The fewest frames that make whole tokens; ValueError where no number does."""
    unit, patch = config.vae.frames_unit, config.denoiser.patch[0]
    for frames in range(1, 1 + patch * unit, unit):  # what is left over repeats after that
        if latent_frames(config, frames) % patch == 0:
            return frames
    raise ValueError(f"clips of 1 + a multiple of {unit} frames have no whole tokens of {patch} latent frames")


def _longest(config: RunConfig, limits: Limits, frames: int) -> int:
    """The most frames that a clip can be cut to; 0 where it has fewer than make whole tokens."""
    unit = config.vae.frames_unit
    num_frames = 1 + ((min(frames, limits.frames) if limits.frames else frames) - 1) // unit * unit
    while num_frames > 0 and latent_frames(config, num_frames) % config.denoiser.patch[0]:
        num_frames -= unit
    return max(0, num_frames)


def _native(
    config: RunConfig, limits: Limits, sides: tuple[int, int], frames: int, width: int, height: int
) -> tuple[int, int, int]:
    """(frames, height, width) of a clip: within its own size, but at least one token."""
    num_frames = _longest(config, limits, frames)
    while math.prod(grid_of(config, num_frames, *sides)) > limits.tokens:
        num_frames = _longest(config, limits, num_frames - 1)
    fitting, aspect = [(sides[0], sides[1])], width / height
    for tall in range(sides[0], height + 1, sides[0]):
        wide = int(tall * aspect // sides[1]) * sides[1]
        for size in (wide, wide + sides[1]):
            if 0 < size <= width and math.prod(grid_of(config, num_frames, tall, size)) <= limits.tokens:
                fitting.append((tall, size))
    off = [abs(math.log(aspect * tall / wide)) for tall, wide in fitting]
    near = [size for size, error in zip(fitting, off, strict=True) if error <= min(off) + NEAR]
    return (num_frames, *max(near, key=lambda size: size[0] * size[1]))
