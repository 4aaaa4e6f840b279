"""Clips in tar shards: index them, read any clip by byte range.

A data set is a folder of WebDataset tars, ``shard-000000.tar`` and so on, each clip two members,
``<key>.json`` (the sidecar, with the caption) and ``<key>.mp4`` (or another allow-listed suffix). Beside each
tar lies ``shard-000000.index.jsonl``, one row a clip; ``index.safetensors`` holds all rows as columns, which a run
maps into memory; ``dataset.json`` names every shard with its size and SHA-256. The tars are a pure function of what
was added, byte for byte, so a hash identifies a data set. The index holds the CRC-32 of what was added, with which
each read is compared, and the SHA-256 of each video. Data sets without columns are read from their rows; tars made by
others, without index or manifest and with ``.txt`` captions, are read as well, unchecked. A data set may also lie
behind a URL (``vidit/data/storage.py``), then with index and manifest.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from vidit.data.agreement import check_agreement
from vidit.data.clip_list import Clips, Part, Table
from vidit.data.clip_ref import ClipRef, ref_of
from vidit.data.column_file import MappedColumns, open_columns
from vidit.data.columns import Columns, is_count
from vidit.data.index_rows import is_rate, read_rows_of
from vidit.data.limits import ClipError
from vidit.data.manifest import COLUMNS, Manifest, index_path, local_manifest, remote_manifest
from vidit.data.remote import DIRECT, STREAMS, Reach, RemoteFile, RemoteFolder, RemotePart, Span
from vidit.data.storage import File, Folder, Readable, folder_of, size_of
from vidit.data.tar import (
    BLOCK,
    CURE,
    Limits,
    ShardError,
    caption_of,
    padded,
    read,
    scan,
    sidecar_of,
    suffix_of,
    video_of,
)  # fmt: skip
from vidit.data.video import probe

LARGEST_GAP = 64 * 1024
"""Bytes between the two members of a clip up to which a remote clip is fetched as one range."""


def read_index(folder: Path | str, reach: Reach = DIRECT) -> Clips:
    """All clips of a data set in a local folder or behind a URL, shards in the order of their names; writes nothing.

    A local shard without an index is scanned, and its videos probed where the sidecar does not give their shape.
    Raises ShardError for every fault found in a file, one message each, ValueError for a URL that is not opened,
    StorageError for a storage that does not answer, and ClipError never.
    """
    place = folder_of(folder, reach)
    table = _remote_table(place) if isinstance(place, RemoteFolder) else _local_table(place)
    if repeated := table.columns.keys.repeated():
        first, second = (table.ref(row) for row in repeated)
        raise ShardError(
            f"{second.shard_path}: key {second.key!r} is also in {first.shard_path.name}; keys must differ"
        )
    if isinstance(table.columns, MappedColumns):
        table = replace(table, columns=table.columns.anew())
    return Clips([Part(table, range(len(table.columns)))])


def _local_table(folder: Path) -> Table:
    if not folder.is_dir():
        raise ShardError(f"{folder} is not a folder; name the folder that `vidit pack` wrote, or its URL (no pipe)")
    shards = [folder / name for name in sorted(item.name for item in os.scandir(folder)) if name.endswith(".tar")]
    if not shards:
        raise ShardError(
            f"{folder} holds no .tar file; name the folder that `vidit pack` wrote (.tar.gz must be unpacked)"
        )
    manifest = local_manifest(folder, shards)
    if manifest and manifest.columns:
        return _table_of_columns(folder, manifest)
    columns = [_indexed(shard) if index_path(shard).exists() else _scanned(shard) for shard in shards]
    return _table(shards, columns, bool(manifest and manifest.allow_empty_captions))


def _scanned(shard: Path) -> Columns:
    return Clips.of(build_index(shard)).parts[0].table.columns


def _indexed(shard: File) -> Columns:
    """The rows beside a shard, which are compared with it."""
    columns = read_rows_of(shard)
    check_agreement(_table([shard], [columns]), np.array([size_of(shard)]))
    return columns


def _table(shards: Sequence[File], columns: Sequence[Columns], allow_empty: bool = False) -> Table:
    starts = np.array([0, *accumulate(map(len, columns))])
    return Table(tuple(shards), starts, Columns.joined(columns), allow_empty)


def _table_of_columns(folder: Folder, manifest: Manifest) -> Table:
    assert manifest.columns
    starts = np.array([0, *accumulate(shard.num_clips for shard in manifest.shards)])
    columns = open_columns(folder / COLUMNS, manifest.columns, int(starts[-1]))
    shards: tuple[File, ...] = tuple(folder / shard.name for shard in manifest.shards)
    table = Table(shards, starts, columns, manifest.allow_empty_captions)
    num_bytes = np.array([shard.num_bytes for shard in manifest.shards])
    check_agreement(table, num_bytes, size_of if isinstance(folder, RemoteFolder) else None)
    return table


def _remote_table(folder: RemoteFolder) -> Table:
    """As ``_local_table``; many shards at a time, since each costs a few answers of a distant server."""
    folder, manifest = remote_manifest(folder)
    if manifest.columns:
        return _table_of_columns(folder, manifest)
    num_bytes = {folder / shard.name: shard.num_bytes for shard in manifest.shards}

    def columns_of(shard: RemoteFile) -> Columns:
        if (found := size_of(shard)) != num_bytes[shard]:
            raise ShardError(f"{shard}: {found} bytes, dataset.json says {num_bytes[shard]}; {CURE}")
        return _indexed(shard)

    with ThreadPoolExecutor(STREAMS) as pool:
        try:
            columns = list(pool.map(columns_of, num_bytes))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return _table(list(num_bytes), columns, manifest.allow_empty_captions)


def build_index(shard: Path) -> list[ClipRef]:
    """Index a tar by its headers, in the tar's order; the sidecars are read. Raises ShardError."""
    refs = []
    for key, members in scan(shard, Limits()).items():
        video = video_of(shard, key, members)
        caption, sidecar = caption_of(shard, key, members)
        try:
            facts = facts_of(sidecar, functools.partial(read, shard, video))
        except ClipError as error:
            raise ShardError(f"{shard}: {video.name}: {error.reason}; {CURE}") from error
        facts |= {
            "caption_chars": len(sidecar["caption"]),
            "video_suffix": suffix_of(video.name),
            "caption_suffix": suffix_of(caption.name),
        }
        refs.append(ref_of(shard, key, video, caption, facts))
    return refs


def read_clip(ref: ClipRef) -> tuple[bytes, str, dict[str, Any]]:
    """(video file, caption, sidecar) of one clip.

    Raises ShardError if the tar is not the one that the index is of, ClipError if the clip was damaged since.
    """
    source: Readable = ref.shard_path
    if isinstance(source, RemoteFile) and (span := _span_of(ref)):
        source = RemotePart(source, *span[1:])
    sidecar = sidecar_of(source, ref.caption)
    return read(source, ref.video), sidecar["caption"], sidecar


def read_sidecar(ref: ClipRef) -> dict[str, Any]:
    """The caption, under that name, and what came with it; the video is not read. Errors as ``read_clip``."""
    return sidecar_of(ref.shard_path, ref.caption)


def expect_clips(refs: Iterable[ClipRef]) -> None:
    """Begin to fetch the remote ones of these clips, all at once; ``read_clip`` of each then waits for less."""
    spans: dict[RemoteFolder, list[Span]] = {}
    for ref in refs:
        if isinstance(ref.shard_path, RemoteFile) and (span := _span_of(ref)):
            spans.setdefault(ref.shard_path.parent, []).append(span)
    for folder, wanted in spans.items():
        folder.expect(wanted)


def _span_of(ref: ClipRef) -> Span | None:
    """Both members of a clip, headers included, as one range; None where something else lies between them."""
    start = min(ref.video_offset, ref.json_offset) - BLOCK
    size = max(ref.video_offset + ref.video_size, ref.json_offset + ref.json_size) - start
    members = sum(BLOCK + padded(each) for each in (ref.video_size, ref.json_size))
    return (ref.shard_path.name, start, size) if size <= members + LARGEST_GAP else None


def facts_of(sidecar: Mapping[str, Any], read_video: Callable[[], bytes]) -> dict[str, Any]:
    """Length, rate and size of a clip, from its sidecar if all are there, else from the video. ClipError."""
    counts = ("num_frames", "width", "height")
    if all(is_count(sidecar.get(name), 1) for name in counts) and is_rate(sidecar.get("fps")):
        return {name: sidecar[name] for name in (*counts, "fps")}
    info = probe(read_video())
    return {name: getattr(info, name) for name in (*counts, "fps")}
