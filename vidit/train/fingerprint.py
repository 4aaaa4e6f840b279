"""What tells one dataset from another, wherever it lies: the shards' names and hashes, the clips' keys and sizes."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import TypedDict

from vidit.data.manifest import shard_hashes
from vidit.data.shards import ClipRef
from vidit.data.storage import Folder


class Fingerprint(TypedDict):
    """Of a list of clips, as checkpoints keep it."""

    num_clips: int
    sha256: str


def fingerprint(refs: Sequence[ClipRef]) -> Fingerprint:
    """Of these clips in this order; folders, and so a move, do not count."""
    return {"num_clips": len(refs), "sha256": digest(refs)}


def digest(refs: Iterable[ClipRef]) -> str:
    """SHA-256 over what identifies each clip. A shard with a manifest is known by its hash, captions included."""
    hashed = hashlib.sha256()
    hashes: dict[Folder, dict[str, str]] = {}
    for ref in refs:
        folder, shard = ref.shard_path.parent, ref.shard_path.name
        if folder not in hashes:
            hashes[folder] = shard_hashes(folder)
        row = (shard, hashes[folder].get(shard), ref.key, ref.video_offset, ref.video_size, ref.json_size)
        hashed.update(json.dumps(row).encode())
    return hashed.hexdigest()
