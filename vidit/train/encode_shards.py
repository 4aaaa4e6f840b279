"""The shards of a set of latents: which clips each holds, and how one rank makes those that are dealt to it.

A shard holds clips of one shape, and those of a shape keep the order of the data set, so that a run on the latents
sees the clips in the order of a run on the videos. Which clips a shard holds, and which of them are encoded together,
follows from the clips alone: its bytes do not depend on how many ranks there are, or on what was done before a kill.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from vidit.batching import micro_batch_rows
from vidit.config import Bucket, RunConfig
from vidit.data.captions import CaptionError
from vidit.data.catalog import Catalog, Dropped
from vidit.data.limits import ClipError
from vidit.data.loader import MicroBatches, read_ahead
from vidit.data.shard_writer import ShardWriter, is_key, sidecar_text
from vidit.data.shards import ClipRef, index_path
from vidit.data.tar import LATENT_SUFFIX
from vidit.train.clips import alone
from vidit.train.encode_clips import ClipEncoder

Check = Callable[[], None]


@dataclass(frozen=True)
class Shard:
    """The clips of one shard, by their numbers in the catalog, and how many of them are encoded together."""

    number: int
    clips: tuple[int, ...]
    shape: Bucket
    rows: int

    @property
    def name(self) -> str:
        return f"shard-{self.number:06d}.tar"


class Made(NamedTuple):
    """A shard that is done: its row of the manifest, None where none of its clips can be used; JSON holds it."""

    number: int
    row: dict[str, Any] | None
    skipped: Dropped
    rounding: float


def shards_of(catalog: Catalog, config: RunConfig, clips_per_shard: int) -> list[Shard]:
    """Every shard of the set, shape by shape."""
    found: list[Shard] = []
    for bucket, (shape, rows) in enumerate(zip(config.data.shapes, micro_batch_rows(config), strict=True)):
        numbers = np.flatnonzero(catalog.bucket == bucket).tolist()
        for start in range(0, len(numbers), clips_per_shard):
            found.append(Shard(len(found), tuple(numbers[start : start + clips_per_shard]), shape, rows))
    return found


class Decoded(NamedTuple):
    """A clip as a worker hands it over; without pixels where it cannot be used, for `reason`."""

    pixels: Tensor | None
    caption: str
    sidecar: dict[str, Any]
    reason: str = ""


class DecodedClips(TorchDataset[Decoded]):
    """Place -> a clip, decoded and cut to the shape of its shard; for worker processes."""

    def __init__(self, config: RunConfig, refs: Sequence[ClipRef], shards: Sequence[Shard]):
        self.clips = MicroBatches(alone(config), Catalog.plain(refs), None, 1)
        self.fps = config.data.fps
        self.places = [(number, shard.shape) for shard in shards for number in shard.clips]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Decoded:
        number, shape = self.places[index]
        ref = self.clips.refs[number]
        try:
            pixels, caption, sidecar = self.clips.decode_whole(ref, shape=shape)
        except (ClipError, CaptionError) as error:
            return Decoded(None, "", {}, str(error))
        return Decoded(pixels, caption, self._sidecar(ref, shape, caption, sidecar))

    def _sidecar(self, ref: ClipRef, shape: Bucket, caption: str, sidecar: dict[str, Any]) -> dict[str, Any]:
        """What the source says of the clip, with the size of the cut in the place of the video's own."""
        try:
            sidecar_text(sidecar)
        except ValueError:  # what JSON cannot hold, in the sidecar of another's tar
            sidecar = {"caption": caption}
        source = {"key": ref.key, **{name: getattr(ref, name) for name in ("num_frames", "width", "height", "fps")}}
        cut = {"num_frames": shape.num_frames, "width": shape.width, "height": shape.height}
        return {**sidecar, **cut, "fps": self.fps or ref.fps, "encoded_from": source}


def make_shards(
    config: RunConfig, refs: Sequence[ClipRef], encoder: ClipEncoder, shards: Sequence[Shard], folder: Path, work: Path,
    check: Check,
) -> Iterator[Made]:  # fmt: skip
    """Write each shard with its index into `folder`, under its name when it is whole; `work` is this rank's own.

    `check` may raise before each micro-batch. Clips are decoded ahead in `data.num_workers` processes.
    """
    decoded = DecodedClips(config, refs, shards)
    ahead = 2 * max((shard.rows for shard in shards), default=1)
    items = read_ahead(decoded, range(len(decoded)), config.data.num_workers, ahead)
    for shard in shards:
        shutil.rmtree(work, ignore_errors=True)
        writer = ShardWriter(
            work, len(shard.clips), 1 << 62, allow_empty_captions=any(refs[n].allow_empty_caption for n in shard.clips)
        )
        skipped, rounding = _fill(writer, shard, refs, encoder, items, check)
        row = None
        if len(skipped) < len(shard.clips):
            path = writer.next_path
            row = {**writer.cut(), "name": shard.name}
            # The tar last: whoever finds it finds its index too.
            index_path(path).replace(index_path(folder / shard.name))
            path.replace(folder / shard.name)
        shutil.rmtree(work)
        yield Made(shard.number, row, skipped, rounding)


def _fill(
    writer: ShardWriter, shard: Shard, refs: Sequence[ClipRef], encoder: ClipEncoder, items: Iterator[Decoded],
    check: Check,
) -> tuple[Dropped, float]:  # fmt: skip
    """Add the clips of a shard, a micro-batch at a time: what is left out and why, and the largest rounding."""
    skipped: Dropped = []
    rounding = 0.0
    for start in range(0, len(shard.clips), shard.rows):
        check()
        numbers = shard.clips[start : start + shard.rows]
        found = [(number, next(items)) for number in numbers]
        skipped += [(refs[number].key, clip.reason) for number, clip in found if clip.pixels is None]
        usable = [(number, clip) for number, clip in found if clip.pixels is not None]
        if not usable:
            continue
        pixels = [clip.pixels for _, clip in usable if clip.pixels is not None]
        members = encoder.encode(pixels, [clip.caption for _, clip in usable])
        for (number, clip), member in zip(usable, members, strict=True):
            key = refs[number].key
            if isinstance(member, str):
                skipped.append((key, member))
                continue
            rounding = max(rounding, member.rounding)
            writer.add(key if is_key(key) else f"clip-{number:09d}", member.content, clip.sidecar, LATENT_SUFFIX)
    return skipped, rounding
