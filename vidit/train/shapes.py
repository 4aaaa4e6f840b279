"""Buckets made of the clips themselves: every shape that the clips of a run have, under a limit of tokens.

`vidit data shapes` prints them. Of a data set the index alone is read.

A clip is cut to the longest length that the VAE can code, and its picture, where it has more tokens than the limit
allows, is scaled down in its own aspect ratio; sides are multiples of what a token, or the caller, asks for. Of the
sizes of about the nearest aspect ratio it takes the largest, by the rule by which clips are put into buckets
(`vidit/data/buckets.py`), so with `data.longest_first` each goes to the shape that was made for it, or one of its
length that it fills as well. What comes of it is a list of buckets like any other: it can be read, changed and kept.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vidit.config import Bucket, ConfigError, RunConfig
from vidit.data.buckets import NEAR, Facts
from vidit.data.catalog import facts_of
from vidit.data.clip_list import Clips
from vidit.data.curation.table import select_clips
from vidit.data.remote import Reach
from vidit.data.shards import ClipRef, read_index
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


def buckets_of_run(config: RunConfig, limits: Limits) -> list[Bucket]:
    """Buckets for the clips of `data.train` or `data.mixture` that rules keep, those set apart for validation left out.

    Errors of `read_index`, `select_clips` and `native_buckets`.
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
    return native_buckets(config, [facts_of(Clips.of(refs), d.fps) for refs in sources], limits)


def native_buckets(config: RunConfig, facts: Sequence[Facts], limits: Limits) -> list[Bucket]:
    """The shapes of the clips of some data sets, those of most clips first.

    ValueError for sides that no token fits, and where nothing is left.
    """
    sides = _sides(config, limits)
    if not any(len(own.frames) for own in facts):
        raise ValueError("there is no clip to take shapes from; give a data set, or fewer clips for validation")
    clips = np.concatenate([np.stack((own.frames, own.width, own.height), axis=1) for own in facts])
    found: Counter[tuple[int, int, int]] = Counter()
    for clip, count in zip(*np.unique(clips, axis=0, return_counts=True), strict=True):
        frames, width, height = (int(number) for number in clip)
        found[_native(config, limits, sides, frames, width, height)] += int(count)
    kept = [shape for shape, count in found.most_common() if count >= limits.share * len(clips)]
    if not kept:
        raise ValueError(f"none of {len(found)} shapes has {limits.share:g} of the {len(clips)} clips; lower --share")
    return [Bucket(num_frames=frames, height=height, width=width) for frames, height, width in kept]


def _sides(config: RunConfig, limits: Limits) -> tuple[int, int]:
    """What height and width are multiples of."""
    own = [config.vae.spatial_stride * patch for patch in config.denoiser.patch[1:]]
    for token in own if limits.side else ():
        if limits.side % token:
            legal = math.lcm(*own)
            raise ValueError(
                f"--side {limits.side} is not divisible by {token}, the pixels of a token (VAE stride "
                f"{config.vae.spatial_stride} x patch); use a multiple of {legal}"
            )
    height, width = (limits.side or token for token in own)
    if math.prod(grid_of(config, _shortest(config), height, width)) > limits.tokens:
        raise ValueError(f"--max-tokens {limits.tokens} is less than a picture of {height}x{width}; raise it")
    return height, width


def _shortest(config: RunConfig) -> int:
    """The fewest frames that make whole tokens."""
    frames = 1
    while latent_frames(config, frames) % config.denoiser.patch[0]:
        frames += config.vae.frames_unit
    return frames


def _native(
    config: RunConfig, limits: Limits, sides: tuple[int, int], frames: int, width: int, height: int
) -> tuple[int, int, int]:
    """(frames, height, width) of a clip: within its own size, but at least one token."""
    shortest, unit = _shortest(config), config.vae.frames_unit
    most = max(shortest, min(frames, limits.frames) if limits.frames else frames)
    num_frames = 1 + (most - 1) // unit * unit
    smallest = (num_frames, *sides)
    while latent_frames(config, num_frames) % config.denoiser.patch[0] or (
        math.prod(grid_of(config, *smallest)) > limits.tokens
    ):
        num_frames -= unit
        smallest = (num_frames, *sides)
    fitting, aspect = [(sides[0], sides[1])], width / height
    for tall in range(sides[0], height + 1, sides[0]):
        wide = int(tall * aspect // sides[1]) * sides[1]
        for size in (wide, wide + sides[1]):
            if 0 < size <= width and math.prod(grid_of(config, num_frames, tall, size)) <= limits.tokens:
                fitting.append((tall, size))
    off = [abs(math.log(aspect * tall / wide)) for tall, wide in fitting]
    near = [size for size, error in zip(fitting, off, strict=True) if error <= min(off) + NEAR]
    return (num_frames, *max(near, key=lambda size: size[0] * size[1]))
