"""Clips in tar shards: write them, index them, read any clip by byte range.

A data set is a folder of WebDataset tars, ``shard-000000.tar`` and so on, each clip two members,
``<key>.json`` (the sidecar, with the caption) and ``<key>.mp4`` (or another allow-listed suffix). Beside each
tar lies ``shard-000000.index.jsonl``, one row a clip, and at the end ``dataset.json`` names every shard with
its size and SHA-256. The tars are a pure function of what was added, byte for byte, so a hash identifies a
data set. Tars made by others, without index or manifest and with ``.txt`` captions, are read as well.

Shards are not trusted. Nothing is extracted, decompressed, unpickled or opened through a URL: members are
read by offset after their header was checked. A link, a device, an absolute path, a ``..``, an unknown
suffix, an over-long name or an over-large member refuses the whole shard, by name, since one bad member
means that the file is not what it is taken for.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, BinaryIO, Self

from vidit.data.video import ClipError, VideoInfo, probe

VIDEO_SUFFIXES = frozenset({"mp4", "mov", "mkv", "webm", "avi", "asf", "m4v"})
CAPTION_SUFFIXES = frozenset({"json", "txt"})
FORMAT, VERSION = "vidit-shards", 1
MANIFEST = "dataset.json"
_BLOCK = 512
_MAX_HEADER_READ = 1 << 20
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,89}")
_CURE = "run `vidit pack` again, or fetch the file again"


class ShardError(ValueError):
    """A shard, index or manifest that cannot be used; the message names the file and the cure."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tar may hold. ``skip_suffixes``: members that are passed over instead of refused."""

    max_video_bytes: int = 1 << 30
    max_caption_bytes: int = 4 << 20
    max_name_chars: int = 240
    max_members: int = 2_000_000
    skip_suffixes: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class ClipRef:
    """Where one clip lies and what it is. Offsets and sizes are in bytes, of the member's content.

    ``json_offset`` and ``json_size`` are those of the caption's member, which is a ``.txt`` where
    ``caption_suffix`` says so.
    """

    shard_path: Path
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


Dataset = tuple[ClipRef, ...]


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    offset: int
    size: int


@dataclass(slots=True)
class _Shard:
    """The shard that is being written."""

    path: Path
    partial: Path
    file: BinaryIO
    tar: Any
    num_bytes: int = 0
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)


class ShardWriter:
    """Writes clips in the order in which they are added; a context manager.

    A shard appears under its name when it is whole; the manifest appears on ``close``. After an exception in
    the ``with`` block the unfinished shard and the manifest are not written.
    """

    def __init__(self, out_dir: Path, max_clips_per_shard: int = 1000, max_bytes: int = 1 << 30) -> None:
        if max_clips_per_shard < 1 or max_bytes < 1:
            raise ValueError(f"max_clips_per_shard={max_clips_per_shard}, max_bytes={max_bytes}; use 1 or more")
        out_dir.mkdir(parents=True, exist_ok=True)
        present = sorted(path.name for path in out_dir.iterdir() if _is_ours(path))
        if present:
            raise ShardError(f"{out_dir} already holds {present[0]}; write to an empty folder")
        self._out_dir, self._max_clips, self._max_bytes = out_dir, max_clips_per_shard, max_bytes
        self._keys: set[str] = set()
        self._done: list[dict[str, Any]] = []
        self._shard: _Shard | None = None

    def add(self, key: str, video: bytes, sidecar: Mapping[str, Any], suffix: str = "mp4") -> None:
        """Append one clip. ``sidecar`` needs a ``caption``; a width, height, fps or num_frames that it lacks
        is probed for the index. Raises ValueError for a bad key, suffix or sidecar, ClipError from the probe.
        """
        if not _KEY.fullmatch(key):
            raise ValueError(f"key {key!r} is not 1 to 90 letters, digits, - and _ starting with no dash")
        if key in self._keys:
            raise ValueError(f"key {key!r} was added before; every clip needs its own")
        if suffix not in VIDEO_SUFFIXES:
            raise ValueError(f"{key}: suffix {suffix!r} is not one of {' '.join(sorted(VIDEO_SUFFIXES))}")
        if not isinstance(sidecar.get("caption"), str):
            raise ValueError(f"{key}: the sidecar has no caption text")
        text = json.dumps(dict(sidecar), sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
        facts = _facts(video, sidecar)
        size = sum(_BLOCK + _padded(len(part)) for part in (video, text))
        shard = self._room_for(size)
        shard.tar.write({"__key__": key, "json": text, suffix: video})
        shard.facts[key] = facts | {"caption_chars": len(sidecar["caption"])}
        shard.num_bytes += size
        self._keys.add(key)

    def close(self) -> dict[str, Any]:
        """Finish the last shard, write the manifest and return it. Raises ValueError if no clip was added."""
        if self._shard is not None:
            self._finish(self._shard)
        if not self._done:
            raise ValueError(f"no clip was added, so {self._out_dir} would be an empty data set")
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "num_clips": sum(shard["num_clips"] for shard in self._done),
            "num_bytes": sum(shard["num_bytes"] for shard in self._done),
            "shards": self._done,
        }
        _write_whole(self._out_dir / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        return manifest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._shard is not None:
            self._shard.tar.close()
            self._shard.file.close()
            self._shard.partial.unlink(missing_ok=True)

    def _room_for(self, size: int) -> _Shard:
        shard = self._shard
        if shard and (len(shard.facts) >= self._max_clips or shard.num_bytes + size > self._max_bytes):
            self._finish(shard)
            shard = None
        return shard or self._start()

    def _start(self) -> _Shard:
        # Imported here because it costs a second, which a reader has no use for.
        from webdataset import TarWriter

        path = self._out_dir / f"shard-{len(self._done):06d}.tar"
        partial = path.with_name(f".{path.name}.partial")
        file = partial.open("wb")
        # An open file, so that no name is ever taken for a `pipe:` command.
        tar = TarWriter(file, user="vidit", group="vidit", mode=0o444, encoder=False, mtime=0)
        self._shard = _Shard(path, partial, file, tar)
        return self._shard

    def _finish(self, shard: _Shard) -> None:
        shard.tar.close()
        shard.file.close()
        # The reader's own scan gives the offsets, so what was written is proven readable before it is named.
        rows = []
        for key, members in _scan(shard.partial, Limits(max_video_bytes=1 << 62)).items():
            video, caption = _video_of(shard.path, key, members), members["json"]
            facts = shard.facts[key] | {"video_suffix": video.name.rpartition(".")[2]}
            rows.append(_ref(shard.path, key, video, caption, facts))
        with shard.partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        num_bytes = shard.partial.stat().st_size
        shard.partial.replace(shard.path)
        _write_whole(index_path(shard.path), "".join(map(_row, rows)))
        self._done.append({"name": shard.path.name, "num_bytes": num_bytes, "sha256": digest, "num_clips": len(rows)})
        self._shard = None


def index_path(shard: Path) -> Path:
    """The index that belongs to a tar."""
    return shard.with_suffix(".index.jsonl")


def read_index(folder: Path | str, limits: Limits | None = None, verify_hashes: bool = False) -> Dataset:
    """All clips of a data set, shards in the order of their names; writes nothing.

    A shard without an index is scanned, and its videos probed where the sidecar does not give their shape.
    ``verify_hashes`` reads every shard in full against the manifest. Raises ShardError for every fault found
    in a file, one message each, and ClipError never.
    """
    folder, limits = Path(folder), limits or Limits()
    if not folder.is_dir():
        raise ShardError(f"{folder} is not a folder; name the folder that `vidit pack` wrote (no URL, no pipe)")
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise ShardError(
            f"{folder} holds no .tar file; name the folder that `vidit pack` wrote (.tar.gz must be unpacked)"
        )
    _check_manifest(folder, shards, verify_hashes)
    refs: dict[str, ClipRef] = {}
    for shard in shards:
        for ref in _read_shard_index(shard) if index_path(shard).exists() else build_index(shard, limits):
            other = refs.setdefault(ref.key, ref)
            if other is not ref:
                raise ShardError(f"{shard}: key {ref.key!r} is also in {other.shard_path.name}; keys must differ")
    return tuple(refs.values())


def build_index(shard: Path, limits: Limits | None = None) -> list[ClipRef]:
    """Index a tar by its headers, in the tar's order; the sidecars are read. Raises ShardError."""
    refs = []
    for key, members in _scan(shard, limits or Limits()).items():
        video = _video_of(shard, key, members)
        caption, sidecar = _caption_member(shard, key, members)
        try:
            facts = _facts(_read(shard, video), sidecar) if not _has_facts(sidecar) else _facts(b"", sidecar)
        except ClipError as error:
            raise ShardError(f"{shard}: {video.name}: {error.reason}; {_CURE}") from error
        facts |= {
            "caption_chars": len(sidecar["caption"]),
            "video_suffix": _suffix(video.name),
            "caption_suffix": _suffix(caption.name),
        }
        refs.append(_ref(shard, key, video, caption, facts))
    return refs


def read_clip(ref: ClipRef) -> tuple[bytes, str, dict[str, Any]]:
    """(video file, caption, sidecar) of one clip. Raises ShardError if the tar is not what the index says."""
    video = _Member(f"{ref.key}.{ref.video_suffix}", ref.video_offset, ref.video_size)
    caption = _Member(f"{ref.key}.{ref.caption_suffix}", ref.json_offset, ref.json_size)
    sidecar = _sidecar(ref.shard_path, caption)
    return _read(ref.shard_path, video), sidecar["caption"], sidecar


def _is_ours(path: Path) -> bool:
    return path.name == MANIFEST or bool(re.fullmatch(r"shard-\d{6}\.(tar|index\.jsonl)", path.name))


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _has_facts(sidecar: Mapping[str, Any]) -> bool:
    sizes = [sidecar.get(name) for name in ("width", "height", "num_frames")]
    return all(_is_count(size, 1) for size in sizes) and _is_rate(sidecar.get("fps"))


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_rate(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _facts(video: bytes, sidecar: Mapping[str, Any]) -> dict[str, Any]:
    source: Mapping[str, Any] = sidecar
    if not _has_facts(sidecar):
        info: VideoInfo = probe(video)
        source = {"width": info.width, "height": info.height, "fps": info.fps, "num_frames": info.num_frames}
    return {name: source[name] for name in ("num_frames", "fps", "width", "height")}


def _ref(shard: Path, key: str, video: _Member, caption: _Member, facts: Mapping[str, Any]) -> ClipRef:
    return ClipRef(shard, key, video.offset, video.size, caption.offset, caption.size, **facts)


def _row(ref: ClipRef) -> str:
    row = asdict(ref)
    del row["shard_path"]
    return json.dumps(row, ensure_ascii=False) + "\n"


class _HeaderReader:
    """A file that gives out small pieces only: a header that claims more is an attack on memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER_READ:
            raise tarfile.ReadError(f"a header of {size} bytes, the limit is {_MAX_HEADER_READ}")
        return self._file.read(size)


def _scan(shard: Path, limits: Limits) -> dict[str, dict[str, _Member]]:
    """Key -> suffix -> member, in the tar's order, by its headers alone."""
    clips: dict[str, dict[str, _Member]] = {}
    for member in _members(shard, limits):
        suffix = _suffix(member.name)
        if suffix in limits.skip_suffixes:
            continue
        members = clips.setdefault(member.name[: -len(suffix) - 1], {})
        if suffix in members:
            raise ShardError(f"{shard}: member {member.name!r} is there twice; {_CURE}")
        members[suffix] = member
    if not clips:
        raise ShardError(f"{shard}: the tar is empty, one clip or more was expected; {_CURE}")
    return clips


def _members(shard: Path, limits: Limits) -> Iterator[_Member]:
    if not shard.is_file():
        raise ShardError(f"{shard} is not a file; {_CURE}")
    num_bytes = shard.stat().st_size
    with shard.open("rb") as file:
        try:
            with tarfile.open(fileobj=_HeaderReader(file), mode="r:") as tar:  # type: ignore[call-overload]
                for count, info in enumerate(tar, start=1):
                    if count > limits.max_members:
                        raise ShardError(f"{shard}: more than {limits.max_members} members")
                    if _is_clip_member(shard, info, limits):
                        yield _Member(_clean_name(info.name), info.offset_data, info.size)
                    if info.offset_data + info.size > num_bytes:
                        raise ShardError(
                            f"{shard}: truncated: member {info.name!r} ends at byte "
                            f"{info.offset_data + info.size}, the file has {num_bytes}; {_CURE}"
                        )
                    tar.members = []  # its list of all members would grow with the shard
                end = tar.offset
        except (tarfile.TarError, ValueError, OverflowError) as error:
            if isinstance(error, ShardError):
                raise
            raise ShardError(f"{shard}: not a whole uncompressed tar: {error}; {_CURE}") from error
        file.seek(end)
        # tarfile takes a damaged header for the end; only the zero blocks that must stand there tell.
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise ShardError(f"{shard}: truncated or damaged at byte {end} of {num_bytes}; {_CURE}")


def _clean_name(name: str) -> str:
    return name.removeprefix("./")


def _is_clip_member(shard: Path, info: tarfile.TarInfo, limits: Limits) -> bool:
    """True for a member to index, False for a plain folder; ShardError for whatever should not be there."""

    def refuse(reason: str) -> ShardError:
        return ShardError(f"{shard}: member {info.name[:120]!r} is refused: {reason}")

    path = PurePosixPath(info.name)
    if len(info.name) > limits.max_name_chars:
        raise refuse(f"its name has {len(info.name)} characters, the limit is {limits.max_name_chars}")
    if path.is_absolute() or ".." in path.parts or "\\" in info.name or ":" in info.name:
        raise refuse("its name is an absolute path, an address or leads out of the shard")
    if not info.name.isprintable():
        raise refuse("its name holds control characters or is not UTF-8")
    if info.isdir():
        return False
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.issparse():
        raise refuse("it is a link, a device or another kind of special file")
    suffix = _suffix(info.name)
    if suffix not in VIDEO_SUFFIXES | CAPTION_SUFFIXES | limits.skip_suffixes:
        raise refuse(f"suffix {suffix!r} is not one of {' '.join(sorted(VIDEO_SUFFIXES | CAPTION_SUFFIXES))}")
    limit = limits.max_caption_bytes if suffix in CAPTION_SUFFIXES else limits.max_video_bytes
    if info.size > limit and suffix not in limits.skip_suffixes:
        raise refuse(f"it has {info.size} bytes, the limit is {limit}")
    return True


def _video_of(shard: Path, key: str, members: Mapping[str, _Member]) -> _Member:
    videos = [member for suffix, member in members.items() if suffix in VIDEO_SUFFIXES]
    if len(videos) != 1:
        raise ShardError(f"{shard}: clip {key!r} has {len(videos)} videos, exactly 1 was expected; {_CURE}")
    return videos[0]


def _caption_member(shard: Path, key: str, members: Mapping[str, _Member]) -> tuple[_Member, dict[str, Any]]:
    """The member that holds the caption: the .json if it has one, else the .txt (video2dataset has both)."""
    if "json" in members and "txt" in members:
        sidecar = _sidecar(shard, members["json"], caption_needed=False)
        if isinstance(sidecar.get("caption"), str):
            return members["json"], sidecar
    member = members.get("txt") or members.get("json")
    if member is None:
        raise ShardError(f"{shard}: clip {key!r} has neither a .json nor a .txt caption; {_CURE}")
    return member, _sidecar(shard, member)


def _sidecar(shard: Path, member: _Member, caption_needed: bool = True) -> dict[str, Any]:
    content = _read(shard, member)
    try:
        text = content.decode("utf-8")
        sidecar = {"caption": text} if _suffix(member.name) == "txt" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{shard}: {member.name} is not valid UTF-8 text or JSON: {error}; {_CURE}") from error
    if not isinstance(sidecar, dict) or (caption_needed and not isinstance(sidecar.get("caption"), str)):
        raise ShardError(f"{shard}: {member.name} has no `caption` text; {_CURE}")
    return sidecar


def _read(shard: Path, member: _Member) -> bytes:
    """A member's content, after its tar header was compared with what the index says."""
    try:
        descriptor = os.open(shard, os.O_RDONLY)
    except OSError as error:
        raise ShardError(f"{shard}: cannot be read: {error.strerror}; {_CURE}") from error
    try:
        block = os.pread(descriptor, _BLOCK + member.size, member.offset - _BLOCK)
    finally:
        os.close(descriptor)
    _check_header(shard, member, block[:_BLOCK])
    if len(block) != _BLOCK + member.size:
        raise ShardError(f"{shard}: truncated: {member.name} has {len(block) - _BLOCK} of {member.size} bytes; {_CURE}")
    return block[_BLOCK:]


def _check_header(shard: Path, member: _Member, header: bytes) -> None:
    place = f"{shard}: at byte {member.offset} the index expects {member.name} of {member.size} bytes"
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.TarError as error:
        raise ShardError(f"{place}, the tar has no header there ({error}); {_CURE}") from error
    # Long and non-ASCII names stand in an extra header before this one, which is not read again here.
    is_plain = member.name.isascii() and len(member.name) <= 98
    if info.size != member.size or (is_plain and _clean_name(info.name).lower() != member.name.lower()):
        raise ShardError(f"{place}, the tar has {info.name} of {info.size} bytes; {_CURE}")


def _read_shard_index(shard: Path) -> list[ClipRef]:
    path = index_path(shard)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ShardError(f"{path} cannot be read: {error}; delete it, or {_CURE}") from error
    refs = [_parsed(shard, line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    if not refs:
        raise ShardError(f"{path} is empty, one clip or more was expected; delete it, or {_CURE}")
    _check_agreement(shard, refs)
    return refs


def _parsed(shard: Path, line: str, place: str) -> ClipRef:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{place} is not JSON: {error}; delete the index, or {_CURE}") from error
    expected = {item.name for item in fields(ClipRef)} - {"shard_path"}
    if not isinstance(row, dict) or set(row) != expected:
        raise ShardError(f"{place} does not have the fields {' '.join(sorted(expected))}; {_CURE}")
    counts = {"video_offset": 512, "json_offset": 512, "num_frames": 1, "width": 1, "height": 1}
    counts |= {"video_size": 0, "json_size": 0, "caption_chars": 0}
    wrong = [name for name, least in counts.items() if not _is_count(row[name], least)]
    wrong += [] if _is_rate(row["fps"]) else ["fps"]
    wrong += [] if isinstance(row["key"], str) and row["key"] else ["key"]
    wrong += [] if row["video_suffix"] in VIDEO_SUFFIXES else ["video_suffix"]
    wrong += [] if row["caption_suffix"] in CAPTION_SUFFIXES else ["caption_suffix"]
    if wrong:
        raise ShardError(f"{place}: {wrong[0]}={row[wrong[0]]!r} cannot be; delete the index, or {_CURE}")
    return ClipRef(shard_path=shard, **row)


def _check_agreement(shard: Path, refs: list[ClipRef]) -> None:
    """Compare an index with its tar: sizes for all rows, headers for the first, the last, and the end."""
    num_bytes = shard.stat().st_size
    spans = [(ref.video_offset, ref.video_size, ref) for ref in refs]
    spans += [(ref.json_offset, ref.json_size, ref) for ref in refs]
    spans.sort(key=lambda span: span[0])
    end = 0
    for offset, size, ref in spans:
        if offset - _BLOCK < end or offset % _BLOCK or offset + size > num_bytes:
            raise ShardError(
                f"{index_path(shard)}: clip {ref.key!r} spans bytes {offset} to {offset + size}, but the tar "
                f"has {num_bytes} bytes and the member before ends at {end}; delete the index, or {_CURE}"
            )
        end = offset + _padded(size)
    with shard.open("rb") as file:
        for ref in (refs[0], refs[-1]):
            file.seek(ref.video_offset - _BLOCK)
            member = _Member(f"{ref.key}.{ref.video_suffix}", ref.video_offset, ref.video_size)
            _check_header(shard, member, file.read(_BLOCK))
        file.seek(end)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise ShardError(
                f"{shard}: the index ends at byte {end}, the tar goes on to {num_bytes}, or breaks off; "
                f"delete the index, or {_CURE}"
            )


def _check_manifest(folder: Path, shards: list[Path], verify_hashes: bool) -> None:
    path = folder / MANIFEST
    if not path.exists():
        if verify_hashes:
            raise ShardError(f"{path} is missing, so there is no hash to verify; {_CURE}")
        return
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = (manifest["format"], manifest["version"])
        listed = {str(row["name"]): (int(row["num_bytes"]), str(row["sha256"])) for row in manifest["shards"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is not a manifest ({type(error).__name__}: {error}); {_CURE}") from error
    if version != (FORMAT, VERSION):
        raise ShardError(f"{path}: format {version}, this version reads {(FORMAT, VERSION)}; {_CURE}")
    present = {shard.name: shard for shard in shards}
    if set(present) != set(listed):
        differing = ", ".join(sorted(set(present) ^ set(listed))[:5])
        raise ShardError(
            f"{folder}: {len(present)} shards are there, {path.name} lists {len(listed)}; "
            f"in one and not the other: {differing}; {_CURE}"
        )
    for name, (num_bytes, sha256) in listed.items():
        _check_listed(present[name], num_bytes, sha256 if verify_hashes else None)


def _check_listed(shard: Path, num_bytes: int, sha256: str | None) -> None:
    found = shard.stat().st_size
    if found != num_bytes:
        raise ShardError(f"{shard}: {found} bytes, {MANIFEST} says {num_bytes}; {_CURE}")
    if sha256 is None:
        return
    with shard.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise ShardError(f"{shard}: SHA-256 {digest}, {MANIFEST} says {sha256}; {_CURE}")
