"""What tells one dataset from another, wherever it lies: the shards' names and hashes, the clips' keys and sizes."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypedDict

from vidit.data.manifest import MANIFEST
from vidit.data.shards import ClipRef


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
    hashes: dict[Path, dict[str, str]] = {}
    for ref in refs:
        folder, shard = ref.shard_path.parent, ref.shard_path.name
        if folder not in hashes:
            hashes[folder] = _shard_hashes(folder)
        row = (shard, hashes[folder].get(shard), ref.key, ref.video_offset, ref.video_size, ref.json_size)
        hashed.update(json.dumps(row).encode())
    return hashed.hexdigest()


def _shard_hashes(folder: Path) -> dict[str, str]:
    """Shard name -> SHA-256, as the manifest has it; empty without one. `read_index` has checked the manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    return {row["name"]: row["sha256"] for row in json.loads(path.read_text(encoding="utf-8"))["shards"]}
