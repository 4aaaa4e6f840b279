"""The manifest of a data set, ``dataset.json``: every shard by name, size and SHA-256; are empty captions meant?"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from vidit.data.tar import CURE, ShardError
from vidit.whole_file import write_whole

MANIFEST = "dataset.json"
FORMAT, VERSION = "vidit-shards", 1


def is_ours(name: str) -> bool:
    """Whether a file of this name is part of a data set: a shard, its index, its scores or the manifest."""
    return name == MANIFEST or bool(re.fullmatch(r"shard-\d{6}\.(tar|(index|scores|scores\.partial)\.jsonl)", name))


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, shards: list[dict[str, Any]], allow_empty_captions: bool) -> dict[str, Any]:
    """Write and return the manifest; each row of ``shards`` has ``name num_bytes sha256 num_clips``."""
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "num_clips": sum(shard["num_clips"] for shard in shards),
        "num_bytes": sum(shard["num_bytes"] for shard in shards),
        "allow_empty_captions": allow_empty_captions,
        "shards": shards,
    }
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


def check_manifest(folder: Path, shards: list[Path]) -> bool:
    """Compare the shards of a folder with its manifest, if it has one: names and sizes. ShardError.

    Returns whether empty captions are there on purpose; without a manifest that says so they are not.
    """
    path = folder / MANIFEST
    if not path.exists():
        return False
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = (manifest["format"], manifest["version"])
        listed = {str(row["name"]): int(row["num_bytes"]) for row in manifest["shards"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is not a manifest ({type(error).__name__}: {error}); {CURE}") from error
    if version != (FORMAT, VERSION):
        raise ShardError(f"{path}: format {version}, this version reads {(FORMAT, VERSION)}; {CURE}")
    present = {shard.name: shard for shard in shards}
    if set(present) != set(listed):
        differing = ", ".join(sorted(set(present) ^ set(listed))[:5])
        raise ShardError(
            f"{folder}: {len(present)} shards are there, {path.name} lists {len(listed)}; "
            f"in one and not the other: {differing}; {CURE}"
        )
    for name, num_bytes in listed.items():
        found = present[name].stat().st_size
        if found != num_bytes:
            raise ShardError(f"{present[name]}: {found} bytes, {MANIFEST} says {num_bytes}; {CURE}")
    return manifest.get("allow_empty_captions") is True
