"""The manifest of a data set, ``dataset.json``: every shard by name, size and SHA-256; the columns of all
clips, by size and SHA-256; are empty captions meant?
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple, overload

from vidit.data.limits import ShardError
from vidit.data.remote import RemoteFile, RemoteFolder
from vidit.data.storage import File, Folder, read_text
from vidit.data.tar import CURE
from vidit.whole_file import write_whole

MANIFEST = "dataset.json"
COLUMNS = "index.safetensors"
ROWS = ".index.jsonl"
FORMAT, VERSION = "vidit-shards", 1
ENCODE_REPORT = "encode_report.json"


class Listed(NamedTuple):
    """The file of columns, as the manifest has it."""

    name: str
    num_bytes: int
    sha256: str


class Shard(NamedTuple):
    """A shard, as the manifest has it; without a file of columns the last two are 0."""

    name: str
    num_bytes: int
    num_clips: int
    index_bytes: int
    """Of the rows beside it."""


class Manifest(NamedTuple):
    """What a data set consists of, shards in the order of their names."""

    shards: tuple[Shard, ...]
    allow_empty_captions: bool
    """Whether empty captions are there on purpose; a manifest that does not say so allows none."""
    columns: Listed | None


@overload
def index_path(shard: Path) -> Path: ...
@overload
def index_path(shard: File) -> File: ...
def index_path(shard: File) -> File:
    """The index that belongs to a tar."""
    return shard.with_suffix(ROWS)


def is_ours(name: str) -> bool:
    """Whether a file of this name is part of a data set: a shard, its index, scores, columns, report or manifest."""
    return name in (MANIFEST, COLUMNS, ENCODE_REPORT) or bool(
        re.fullmatch(r"shard-\d{6}\.(tar|(index|scores|scores\.partial)\.jsonl)", name)
    )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(
    folder: Path, shards: list[dict[str, Any]], allow_empty_captions: bool, columns: Listed, **more: Any
) -> dict[str, Any]:
    """Write and return the manifest; each row of ``shards`` has ``name num_bytes sha256 num_clips index_bytes``.

    ``more`` is added as it is: ``encoded`` in a set of latents (`vidit/data/encoded.py`).
    """
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "num_clips": sum(shard["num_clips"] for shard in shards),
        "num_bytes": sum(shard["num_bytes"] for shard in shards),
        "allow_empty_captions": allow_empty_captions,
        "columns": columns._asdict(),
        **more,
        "shards": shards,
    }
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


def local_manifest(folder: Path, shards: list[Path]) -> Manifest | None:
    """The manifest of a folder, if it has one, compared with what is there: names and sizes. ShardError."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = _parsed(path)
    present = {shard.name: shard for shard in shards}
    listed = {shard.name for shard in manifest.shards}
    if set(present) != listed:
        differing = ", ".join(sorted(set(present) ^ listed)[:5])
        raise ShardError(
            f"{folder}: {len(present)} shards are there, {path.name} lists {len(listed)}; "
            f"in one and not the other: {differing}; {CURE}"
        )
    with os.scandir(folder) as items:  # one look at the folder, not one a file
        sizes = {item.name: item.stat().st_size for item in items}
    for shard in manifest.shards:
        expected = {shard.name: shard.num_bytes}
        if manifest.columns:
            # The rows are not read then: that they were changed or are missing must not go unseen.
            expected[shard.name.removesuffix(".tar") + ROWS] = shard.index_bytes
        for name, num_bytes in expected.items():
            if (found := sizes.get(name, 0)) != num_bytes:
                raise ShardError(f"{folder / name}: {found} bytes, {MANIFEST} says {num_bytes}; {CURE}")
    return manifest


def remote_manifest(folder: RemoteFolder) -> tuple[RemoteFolder, Manifest]:
    """The manifest of a remote folder, with the folder in this state: a cache keeps it apart from any other.

    A URL cannot be listed, so its manifest says what is there; a name that is not a shard's is refused. ShardError,
    StorageError.
    """
    text = read_text(folder / MANIFEST)
    folder = RemoteFolder(folder.url, folder.reach, text)
    manifest = _parsed(folder / MANIFEST, text)
    for shard in manifest.shards:
        if not (is_ours(shard.name) and shard.name.endswith(".tar")):
            raise ShardError(f"{folder}/{MANIFEST} lists {shard.name[:120]!r}, which is no shard's name; {CURE}")
    if not manifest.shards:
        raise ShardError(f"{folder}/{MANIFEST} lists no shard; {CURE}")
    return folder, manifest


def manifest_text(folder: Folder) -> str:
    """The manifest of a folder whose clips have been listed; empty without one."""
    if isinstance(folder, Path):
        path = folder / MANIFEST
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    return folder.manifest


def shard_hashes(folder: Folder) -> dict[str, str]:
    """Shard name -> SHA-256, of those of which the manifest has it; empty without one."""
    text = manifest_text(folder)
    rows = json.loads(text)["shards"] if text else []
    return {row["name"]: row["sha256"] for row in rows if row.get("sha256")}


def _parsed(path: Path | RemoteFile, text: str | None = None) -> Manifest:
    try:
        content = json.loads(read_text(path) if text is None else text)
        version = (content["format"], content["version"])
        rows = sorted(content["shards"], key=lambda row: str(row["name"]))
        allow_empty, columns = content.get("allow_empty_captions") is True, content.get("columns")
        # Without columns a shard's name and size are all that is needed, and may be all there is.
        counts = [(int(row["num_clips"]), int(row["index_bytes"])) if columns else (0, 0) for row in rows]
        shards = tuple(
            Shard(str(row["name"]), int(row["num_bytes"]), *count) for row, count in zip(rows, counts, strict=True)
        )
        listed = Listed(str(columns["name"]), int(columns["num_bytes"]), str(columns["sha256"])) if columns else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ShardError(f"{path} is not a manifest ({type(error).__name__}: {error}); {CURE}") from error
    if version != (FORMAT, VERSION):
        raise ShardError(f"{path}: format {version}, this version reads {(FORMAT, VERSION)}; {CURE}")
    if listed and (listed.name != COLUMNS or min((shard.num_clips for shard in shards), default=0) < 1):
        raise ShardError(f"{path}: its columns are not in {COLUMNS}, or are of a shard without clips; {CURE}")
    if len({shard.name for shard in shards}) < len(shards):
        raise ShardError(f"{path} lists a shard twice; {CURE}")
    return Manifest(shards, allow_empty, listed)
