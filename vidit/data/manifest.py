"""The manifest of a data set, ``dataset.json``: every shard by name, size and SHA-256; are empty captions meant?"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from vidit.data.limits import ShardError
from vidit.data.remote import RemoteFile, RemoteFolder
from vidit.data.storage import Folder, read_text
from vidit.data.tar import CURE
from vidit.whole_file import write_whole

MANIFEST = "dataset.json"
FORMAT, VERSION = "vidit-shards", 1
ENCODE_REPORT = "encode_report.json"


def is_ours(name: str) -> bool:
    """Whether a file of this name is part of a data set: a shard, its index, its scores, a report, the manifest."""
    return name in (MANIFEST, ENCODE_REPORT) or bool(
        re.fullmatch(r"shard-\d{6}\.(tar|(index|scores|scores\.partial)\.jsonl)", name)
    )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(
    folder: Path, shards: list[dict[str, Any]], allow_empty_captions: bool, **more: Any
) -> dict[str, Any]:
    """Write and return the manifest; each row of ``shards`` has ``name num_bytes sha256 num_clips``.

    ``more`` is added as it is: ``encoded`` in a set of latents (`vidit/data/encoded.py`).
    """
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "num_clips": sum(shard["num_clips"] for shard in shards),
        "num_bytes": sum(shard["num_bytes"] for shard in shards),
        "allow_empty_captions": allow_empty_captions,
        **more,
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
    listed, allow_empty = _parsed(path)
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
    return allow_empty


def remote_shards(folder: RemoteFolder) -> tuple[dict[RemoteFile, int], bool]:
    """The shards of a remote folder with their sizes, in the order of their names, and whether captions may be empty.

    A URL cannot be listed, so its manifest says what is there; a name that is not a shard's is refused. The files
    returned belong to this state of the data set: a cache keeps it apart from any other. ShardError, StorageError.
    """
    text = read_text(folder / MANIFEST)
    folder = RemoteFolder(folder.url, folder.reach, text)
    listed, allow_empty = _parsed(folder / MANIFEST, text)
    for name in listed:
        if not (is_ours(name) and name.endswith(".tar")):
            raise ShardError(f"{folder}/{MANIFEST} lists {name[:120]!r}, which is no shard's name; {CURE}")
    if not listed:
        raise ShardError(f"{folder}/{MANIFEST} lists no shard; {CURE}")
    return {folder / name: listed[name] for name in sorted(listed)}, allow_empty


def manifest_text(folder: Folder) -> str:
    """The manifest of a folder whose clips have been listed; empty without one."""
    if isinstance(folder, Path):
        path = folder / MANIFEST
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    return folder.manifest


def shard_hashes(folder: Folder) -> dict[str, str]:
    """Shard name -> SHA-256, as the manifest has it; empty without one."""
    text = manifest_text(folder)
    return {row["name"]: row["sha256"] for row in json.loads(text)["shards"]} if text else {}


class _Manifest(NamedTuple):
    """Bytes of each shard, and whether empty captions are there on purpose."""

    shards: dict[str, int]
    allow_empty: bool


def _parsed(path: Path | RemoteFile, text: str | None = None) -> _Manifest:
    try:
        manifest = json.loads(read_text(path) if text is None else text)
        version = (manifest["format"], manifest["version"])
        listed = {str(row["name"]): int(row["num_bytes"]) for row in manifest["shards"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ShardError(f"{path} is not a manifest ({type(error).__name__}: {error}); {CURE}") from error
    if version != (FORMAT, VERSION):
        raise ShardError(f"{path}: format {version}, this version reads {(FORMAT, VERSION)}; {CURE}")
    return _Manifest(listed, manifest.get("allow_empty_captions") is True)
