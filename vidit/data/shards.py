"""Clips in tar shards: index them, read any clip by byte range.

A data set is a folder of WebDataset tars, ``shard-000000.tar`` and so on, each clip two members,
``<key>.json`` (the sidecar, with the caption) and ``<key>.mp4`` (or another allow-listed suffix). Beside each
tar lies ``shard-000000.index.jsonl``, one row a clip, and at the end ``dataset.json`` names every shard with
its size and SHA-256. The tars are a pure function of what was added, byte for byte, so a hash identifies a
data set. The index holds the CRC-32 of what was added, with which each read is compared, and the SHA-256 of each
video. Tars made by others, without index or manifest and with ``.txt`` captions, are read as well, unchecked. A data
set may also lie behind a URL (``vidit/data/storage.py``), then with index and manifest.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, overload

from vidit.data.limits import ClipError
from vidit.data.manifest import MANIFEST, check_manifest, remote_shards
from vidit.data.remote import DIRECT, STREAMS, Reach, RemoteFile, RemoteFolder, RemotePart, Span
from vidit.data.storage import File, Readable, folder_of, read_range, read_text, size_of
from vidit.data.tar import (
    BLOCK,
    CAPTION_SUFFIXES,
    CURE,
    MEDIA_SUFFIXES,
    Limits,
    Member,
    ShardError,
    caption_of,
    check_header,
    padded,
    read,
    scan,
    sidecar_of,
    suffix_of,
    video_of,
)  # fmt: skip
from vidit.data.video import probe


@dataclass(frozen=True, slots=True)
class ClipRef:
    """Where one clip lies and what it is. Offsets and sizes are in bytes, of the member's content.

    The fields ``json_*`` are of the caption's member, which is a ``.txt`` where ``caption_suffix`` says so. A CRC
    is None in a tar that has no index, or one whose index has none.
    """

    shard_path: File
    key: str
    video_offset: int
    video_size: int
    json_offset: int
    json_size: int
    num_frames: int
    fps: float
    width: int
    height: int
    caption_chars: int
    video_suffix: str = "mp4"
    caption_suffix: str = "json"
    video_crc32: int | None = None
    json_crc32: int | None = None
    video_sha256: str | None = None
    """In hexadecimal digits; None where the index has none. Two clips with the same one are the same file."""
    allow_empty_caption: bool = False
    """Whether its data set was packed with empty captions on purpose; the manifest says so, not the index."""


_NOT_IN_INDEX = {"shard_path", "allow_empty_caption"}
_CRCS = {"video_crc32", "json_crc32"}
_OPTIONAL = _CRCS | {"video_sha256"}
"""What an index that an earlier version wrote may lack."""
Dataset = tuple[ClipRef, ...]


LARGEST_GAP = 64 * 1024
"""Bytes between the two members of a clip up to which a remote clip is fetched as one range."""


@overload
def index_path(shard: Path) -> Path: ...
@overload
def index_path(shard: File) -> File: ...
def index_path(shard: File) -> File:
    """The index that belongs to a tar."""
    return shard.with_suffix(".index.jsonl")


def read_index(folder: Path | str, reach: Reach = DIRECT) -> Dataset:
    """All clips of a data set in a local folder or behind a URL, shards in the order of their names; writes nothing.

    A local shard without an index is scanned, and its videos probed where the sidecar does not give their shape.
    Raises ShardError for every fault found in a file, one message each, ValueError for a URL that is not opened,
    StorageError for a storage that does not answer, and ClipError never.
    """
    place = folder_of(folder, reach)
    found, allow_empty = _remote_refs(place) if isinstance(place, RemoteFolder) else _local_refs(place)
    refs: dict[str, ClipRef] = {}
    for ref in found:
        ref = replace(ref, allow_empty_caption=True) if allow_empty else ref
        other = refs.setdefault(ref.key, ref)
        if other is not ref:
            raise ShardError(f"{ref.shard_path}: key {ref.key!r} is also in {other.shard_path.name}; keys must differ")
    return tuple(refs.values())


def _local_refs(folder: Path) -> tuple[Iterator[ClipRef], bool]:
    """The clips of a folder, and whether their captions may be empty."""
    if not folder.is_dir():
        raise ShardError(f"{folder} is not a folder; name the folder that `vidit pack` wrote, or its URL (no pipe)")
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise ShardError(
            f"{folder} holds no .tar file; name the folder that `vidit pack` wrote (.tar.gz must be unpacked)"
        )
    allow_empty = check_manifest(folder, shards)
    per_shard = (_read_shard_index(shard) if index_path(shard).exists() else build_index(shard) for shard in shards)
    return (ref for refs in per_shard for ref in refs), allow_empty


def _remote_refs(folder: RemoteFolder) -> tuple[Iterator[ClipRef], bool]:
    """As ``_local_refs``, many shards at a time, since each costs a few answers of a distant server."""
    shards, allow_empty = remote_shards(folder)

    def refs_of(shard: RemoteFile) -> list[ClipRef]:
        if (found := size_of(shard)) != shards[shard]:
            raise ShardError(f"{shard}: {found} bytes, {MANIFEST} says {shards[shard]}; {CURE}")
        return _read_shard_index(shard)

    with ThreadPoolExecutor(STREAMS) as pool:
        try:
            per_shard = list(pool.map(refs_of, shards))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return (ref for refs in per_shard for ref in refs), allow_empty


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
    video = Member(f"{ref.key}.{ref.video_suffix}", ref.video_offset, ref.video_size, ref.video_crc32)
    source: Readable = ref.shard_path
    if isinstance(source, RemoteFile) and (span := _span_of(ref)):
        source = RemotePart(source, *span[1:])
    sidecar = sidecar_of(source, _caption_member(ref))
    return read(source, video), sidecar["caption"], sidecar


def read_sidecar(ref: ClipRef) -> dict[str, Any]:
    """The caption, under that name, and what came with it; the video is not read. Errors as ``read_clip``."""
    return sidecar_of(ref.shard_path, _caption_member(ref))


def expect_clips(refs: Iterable[ClipRef]) -> None:
    """Begin to fetch the remote ones of these clips, all at once; ``read_clip`` of each then waits for less."""
    spans: dict[RemoteFolder, list[Span]] = {}
    for ref in refs:
        if isinstance(ref.shard_path, RemoteFile) and (span := _span_of(ref)):
            spans.setdefault(ref.shard_path.parent, []).append(span)
    for folder, wanted in spans.items():
        folder.expect(wanted)


def _caption_member(ref: ClipRef) -> Member:
    return Member(f"{ref.key}.{ref.caption_suffix}", ref.json_offset, ref.json_size, ref.json_crc32)


def _span_of(ref: ClipRef) -> Span | None:
    """Both members of a clip, headers included, as one range; None where something else lies between them."""
    start = min(ref.video_offset, ref.json_offset) - BLOCK
    size = max(ref.video_offset + ref.video_size, ref.json_offset + ref.json_size) - start
    members = sum(BLOCK + padded(each) for each in (ref.video_size, ref.json_size))
    return (ref.shard_path.name, start, size) if size <= members + LARGEST_GAP else None


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_rate(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))


def facts_of(sidecar: Mapping[str, Any], read_video: Callable[[], bytes]) -> dict[str, Any]:
    """Length, rate and size of a clip, from its sidecar if all are there, else from the video. ClipError."""
    counts = ("num_frames", "width", "height")
    if all(_is_count(sidecar.get(name), 1) for name in counts) and _is_rate(sidecar.get("fps")):
        return {name: sidecar[name] for name in (*counts, "fps")}
    info = probe(read_video())
    return {name: getattr(info, name) for name in (*counts, "fps")}


def ref_of(shard: File, key: str, video: Member, caption: Member, facts: Mapping[str, Any]) -> ClipRef:
    """One clip from where its members lie and from ``facts``, the other fields of ClipRef."""
    return ClipRef(shard, key, video.offset, video.size, caption.offset, caption.size, **facts)


def row_of(ref: ClipRef) -> str:
    """A clip's line of the index."""
    row = {name: value for name, value in asdict(ref).items() if name not in _NOT_IN_INDEX}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read_shard_index(shard: File) -> list[ClipRef]:
    path = index_path(shard)
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ShardError(f"{path} cannot be read: {error}; delete it, or {CURE}") from error
    refs = [_parsed(shard, line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    if not refs:
        raise ShardError(f"{path} is empty, one clip or more was expected; delete it, or {CURE}")
    _check_agreement(shard, refs)
    return refs


def _parsed(shard: File, line: str, place: str) -> ClipRef:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{place} is not JSON: {error}; delete the index, or {CURE}") from error
    expected = {item.name for item in fields(ClipRef)} - _NOT_IN_INDEX
    if not isinstance(row, dict) or not expected - _OPTIONAL <= set(row) <= expected:
        raise ShardError(f"{place} does not have the fields {' '.join(sorted(expected))}; {CURE}")
    counts = {"video_offset": 512, "json_offset": 512, "num_frames": 1, "width": 1, "height": 1}
    counts |= {"video_size": 0, "json_size": 0, "caption_chars": 0} | dict.fromkeys(_CRCS & set(row), 0)
    wrong = [name for name, least in counts.items() if not _is_count(row[name], least)]
    wrong += [] if _is_rate(row["fps"]) else ["fps"]
    wrong += [] if isinstance(row["key"], str) and row["key"] else ["key"]
    wrong += [] if _is_sha256(row.get("video_sha256", "0" * 64)) else ["video_sha256"]
    wrong += [] if row["video_suffix"] in MEDIA_SUFFIXES else ["video_suffix"]
    wrong += [] if row["caption_suffix"] in CAPTION_SUFFIXES else ["caption_suffix"]
    if wrong:
        raise ShardError(f"{place}: {wrong[0]}={row[wrong[0]]!r} cannot be; delete the index, or {CURE}")
    return ClipRef(shard_path=shard, **row)


def _check_agreement(shard: File, refs: list[ClipRef]) -> None:
    """Compare an index with its tar: sizes for all rows, headers for the first, the last, and the end."""
    num_bytes = size_of(shard)
    spans = [(ref.video_offset, ref.video_size, ref) for ref in refs]
    spans += [(ref.json_offset, ref.json_size, ref) for ref in refs]
    spans.sort(key=lambda span: span[0])
    end = 0
    for offset, size, ref in spans:
        if offset - BLOCK < end or offset % BLOCK or offset + size > num_bytes:
            raise ShardError(
                f"{index_path(shard)}: clip {ref.key!r} spans bytes {offset} to {offset + size}, but the tar "
                f"has {num_bytes} bytes and the member before ends at {end}; delete the index, or {CURE}"
            )
        end = offset + padded(size)
    for ref in (refs[0], refs[-1]):
        member = Member(f"{ref.key}.{ref.video_suffix}", ref.video_offset, ref.video_size)
        check_header(shard, member, read_range(shard, ref.video_offset - BLOCK, BLOCK))
    if end + BLOCK > num_bytes or read_range(shard, end, BLOCK) != bytes(BLOCK):
        raise ShardError(
            f"{shard}: the index ends at byte {end}, the tar goes on to {num_bytes}, or breaks off; "
            f"delete the index, or {CURE}"
        )
