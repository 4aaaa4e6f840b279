"""What tells one dataset from another, wherever it lies: the shards' names and hashes, and which clips of them.

A shard with a manifest is known by its SHA-256, which fixes all that is in it, so a clip of it is its place there. In
one without, a clip is its key, its place and its sizes. Both are hashed as columns, a gigabyte a second.
"""

import hashlib
import json
from collections.abc import Collection, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from vidit.data.clip_list import Clips, Part
from vidit.data.manifest import shard_hashes
from vidit.data.shards import ClipRef
from vidit.data.storage import File


class Fingerprint(TypedDict):
    """Of a list of clips, as checkpoints keep it."""

    num_clips: int
    sha256: str


class _Shards:
    """Shards by name and hash, numbered as they are met."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str | None], int] = {}
        self._hashes: dict[str, dict[str, str]] = {}

    def number(self, shard: File) -> tuple[int, bool]:
        """(number of a shard, whether its hash is known)."""
        folder, _, name = str(shard).rpartition("/")
        if folder not in self._hashes:
            self._hashes[folder] = shard_hashes(shard.parent)
        sha256 = self._hashes[folder].get(name)
        return self.known.setdefault((name, sha256), len(self.known)), sha256 is not None

    def of(self, part: Part) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The same of each clip."""
        own = part.table.shard_numbers(part.rows)
        numbers, hashed = np.zeros(len(part.table.shards), np.int64), np.zeros(len(part.table.shards), bool)
        starts = np.concatenate([[0], np.flatnonzero(np.diff(own)) + 1])
        for at in dict.fromkeys(own[starts].tolist()):
            numbers[at], hashed[at] = self.number(part.table.shards[at])
        return numbers[own], hashed[own]


def fingerprint(refs: Sequence[ClipRef]) -> Fingerprint:
    """Of these clips in this order; folders, and so a move, do not count."""
    return {"num_clips": len(refs), "sha256": digest(refs)}


def order_of(refs: Sequence[ClipRef], lost: Collection[str]) -> str:
    """What the order of a run stands on: a digest of its clips without those of the keys `lost`, which could not be
    encoded before the first step.
    """
    clips = Clips.of(refs)
    if lost:
        kept = [number for number in range(len(clips)) if clips.key(number) not in lost]
        clips = clips.take(np.array(kept, np.int64))
    return digest(clips)


def digest(refs: Sequence[ClipRef]) -> str:
    """SHA-256 over what identifies each clip, in their order; the same for the same clips in any kind of list."""
    clips, shards = Clips.of(refs), _Shards()
    # A hash a column: where one part of a list ends and the next begins then makes no difference.
    places, sizes, keys = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    for part in clips.parts:
        numbers, hashed = shards.of(part)
        places.update(_bytes(numbers, part.column("video_offset")))
        if not hashed.all():
            bare = part.taken(np.flatnonzero(~hashed))
            lengths = np.diff(bare.keys.ends, prepend=0)
            sizes.update(_bytes(bare.column("video_size"), bare.column("json_size"), lengths))
            keys.update(bare.keys.content.tobytes())
    table = json.dumps([len(clips), *([name, sha256] for name, sha256 in shards.known)])
    columns = " ".join(column.hexdigest() for column in (places, sizes, keys))
    return hashlib.sha256(f"{table} {columns}".encode()).hexdigest()


def _bytes(*columns: NDArray[np.int64]) -> memoryview:
    return np.stack(columns, 1).astype("<i8", copy=False).data
