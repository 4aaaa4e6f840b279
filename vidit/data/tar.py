"""The members of one tar: found by their headers alone, read by byte range.

Shards are not trusted. Nothing is extracted, decompressed, unpickled or opened through a URL: members are
read by offset after their header was checked. A link, a device, an absolute path, a ``..``, an unknown
suffix, an over-long name or an over-large member refuses the whole shard, by name, since one bad member
means that the file is not what it is taken for.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from vidit.data.limits import ClipError, ShardError
from vidit.data.storage import Readable, read_range

VIDEO_SUFFIXES = frozenset({"mp4", "mov", "mkv", "webm", "avi", "asf", "m4v"})
LATENT_SUFFIX = "safetensors"
MEDIA_SUFFIXES = VIDEO_SUFFIXES | {LATENT_SUFFIX}
"""Of what a clip is: a video, or what `vidit encode` has made of one."""
CAPTION_SUFFIXES = frozenset({"json", "txt"})
BLOCK = 512
CURE = "make it again with `vidit pack` or `vidit encode`, or fetch the file again"
_MAX_HEADER_READ = 1 << 20
LARGEST_STEP_BACK = 4 * BLOCK
"""How far tarfile steps back in a file that it reads in order: a block and a byte, with room."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tar may hold."""

    max_video_bytes: int = 1 << 30
    max_caption_bytes: int = 4 << 20
    max_name_chars: int = 240
    max_members: int = 2_000_000


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a tar: where its content lies, in bytes, and its CRC-32 where an index holds it."""

    name: str
    offset: int
    size: int
    crc32: int | None = None


def padded(size: int) -> int:
    """The bytes that a content of ``size`` bytes takes in a tar, without its header."""
    return -(-size // BLOCK) * BLOCK


def suffix_of(name: str) -> str:
    return name.rpartition(".")[2].lower()


class Sequential(Protocol):
    """A file that is read from front to back: `seek` goes forward, and back by ``LARGEST_STEP_BACK`` bytes at most."""

    def read(self, size: int, /) -> bytes: ...

    def seek(self, offset: int, /) -> int: ...

    def tell(self) -> int: ...


class _HeaderReader:
    """A file that gives out small pieces only: a header that claims more is an attack on memory."""

    def __init__(self, file: Sequential) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER_READ:
            raise tarfile.ReadError(f"a header of {size} bytes, the limit is {_MAX_HEADER_READ}")
        return self._file.read(size)


def scan(shard: Path, limits: Limits) -> dict[str, dict[str, Member]]:
    """Key -> suffix -> member, in the tar's order, by its headers alone."""
    if not shard.is_file():
        raise ShardError(f"{shard} is not a file; {CURE}")
    clips: dict[str, dict[str, Member]] = {}
    with shard.open("rb") as file:
        for member in members_of(file, shard, shard.stat().st_size, limits):
            key, suffix = key_of(member)
            members = clips.setdefault(key, {})
            if suffix in members:
                raise ShardError(f"{shard}: member {member.name!r} is there twice; {CURE}")
            members[suffix] = member
    if not clips:
        raise ShardError(f"{shard}: the tar is empty, one clip or more was expected; {CURE}")
    return clips


def key_of(member: Member) -> tuple[str, str]:
    """(key of the clip, suffix) of one of its members."""
    suffix = suffix_of(member.name)
    return member.name[: -len(suffix) - 1], suffix


def members_of(file: Sequential, shard: Readable, num_bytes: int, limits: Limits) -> Iterator[Member]:
    """The members of an open tar of so many bytes, in its order; ``shard`` is what errors call it. ShardError.

    Between two of them the caller may read from ``file`` the member that it was given.
    """
    try:
        with tarfile.open(fileobj=_HeaderReader(file), mode="r:") as tar:  # type: ignore[call-overload]
            for count, info in enumerate(tar, start=1):
                if count > limits.max_members:
                    raise ShardError(f"{shard}: more than {limits.max_members} members")
                is_member = _is_clip_member(shard, info, limits)
                if info.offset_data + info.size > num_bytes:
                    raise ShardError(
                        f"{shard}: truncated: member {info.name!r} ends at byte "
                        f"{info.offset_data + info.size}, the file has {num_bytes}; {CURE}"
                    )
                if is_member:
                    yield Member(_clean_name(info.name), info.offset_data, info.size)
                tar.members = []  # its list of all members would grow with the shard
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{shard}: not a whole uncompressed tar: {error}; {CURE}") from error
    file.seek(end)
    # tarfile takes a damaged header for the end; only the zero blocks that must stand there tell.
    if file.read(BLOCK) != bytes(BLOCK):
        raise ShardError(f"{shard}: truncated or damaged at byte {end} of {num_bytes}; {CURE}")


def _clean_name(name: str) -> str:
    return name.removeprefix("./")


def _is_clip_member(shard: Readable, info: tarfile.TarInfo, limits: Limits) -> bool:
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
    suffix = suffix_of(info.name)
    if suffix not in MEDIA_SUFFIXES | CAPTION_SUFFIXES:
        raise refuse(f"suffix {suffix!r} is not one of {' '.join(sorted(MEDIA_SUFFIXES | CAPTION_SUFFIXES))}")
    limit = limits.max_caption_bytes if suffix in CAPTION_SUFFIXES else limits.max_video_bytes
    if info.size > limit:
        raise refuse(f"it has {info.size} bytes, the limit is {limit}")
    return True


def video_of(shard: Path, key: str, members: Mapping[str, Member]) -> Member:
    """The one member that is a video or a latent. ShardError for none or several."""
    videos = [member for suffix, member in members.items() if suffix in MEDIA_SUFFIXES]
    if len(videos) != 1:
        raise ShardError(f"{shard}: clip {key!r} has {len(videos)} videos, exactly 1 was expected; {CURE}")
    return videos[0]


def caption_of(shard: Path, key: str, members: Mapping[str, Member]) -> tuple[Member, dict[str, Any]]:
    """The member that holds the caption: the .json if it has one, else the .txt (video2dataset has both)."""
    if "json" in members and "txt" in members:
        sidecar = sidecar_of(shard, members["json"], caption_needed=False)
        if isinstance(sidecar.get("caption"), str):
            return members["json"], sidecar
    member = members.get("txt") or members.get("json")
    if member is None:
        raise ShardError(f"{shard}: clip {key!r} has neither a .json nor a .txt caption; {CURE}")
    return member, sidecar_of(shard, member)


def sidecar_of(shard: Readable, member: Member, caption_needed: bool = True) -> dict[str, Any]:
    """The object in a .json, or the text of a .txt as its ``caption``. ShardError; ClipError as from ``read``."""
    return parse_sidecar(f"{shard}: {member.name}", read(shard, member), caption_needed)


def parse_sidecar(name: str, content: bytes, caption_needed: bool = True) -> dict[str, Any]:
    """The same of the content of a member; ``name`` is what errors call it, and ends in its suffix. ShardError."""
    try:
        text = content.decode("utf-8")
        sidecar = {"caption": text} if suffix_of(name) == "txt" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{name} is not valid UTF-8 text or JSON: {error}; {CURE}") from error
    if not isinstance(sidecar, dict) or (caption_needed and not isinstance(sidecar.get("caption"), str)):
        raise ShardError(f"{name} has no `caption` text; {CURE}")
    return sidecar


def read(shard: Readable, member: Member) -> bytes:
    """A member's content, after its tar header and its CRC-32 were compared with what the index says.

    Raises ShardError for a tar that does not belong to its index, ClipError for content that was damaged later. What
    differs in a remote tar is read once more, past the cache, since it may have been damaged on the way.
    """
    try:
        return _read_once(shard, member)
    except (ClipError, ShardError):
        if isinstance(shard, Path):
            raise
        return _read_once(shard, member, fresh=True)


def _read_once(shard: Readable, member: Member, fresh: bool = False) -> bytes:
    try:
        block = read_range(shard, member.offset - BLOCK, BLOCK + member.size, fresh)
    except OSError as error:
        raise ShardError(f"{shard}: cannot be read: {error.strerror}; {CURE}") from error
    check_header(shard, member, block[:BLOCK])
    if len(block) != BLOCK + member.size:
        raise ShardError(f"{shard}: truncated: {member.name} has {len(block) - BLOCK} of {member.size} bytes; {CURE}")
    content = block[BLOCK:]
    if member.crc32 is not None and (found := zlib.crc32(content)) != member.crc32:
        raise ClipError(f"{shard}: {member.name} is damaged: CRC-32 {found:08x}, its index says {member.crc32:08x}")
    return content


def check_header(shard: Readable, member: Member, header: bytes) -> None:
    """Compare a tar header with what an index says of its member. ShardError where they differ."""
    place = f"{shard}: at byte {member.offset} the index expects {member.name} of {member.size} bytes"
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.TarError as error:
        raise ShardError(f"{place}, the tar has no header there ({error}); {CURE}") from error
    # Long and non-ASCII names stand in an extra header before this one, which is not read again here.
    is_plain = member.name.isascii() and len(member.name) <= 98
    if info.size != member.size or (is_plain and _clean_name(info.name).lower() != member.name.lower()):
        raise ShardError(f"{place}, the tar has {info.name} of {info.size} bytes; {CURE}")
