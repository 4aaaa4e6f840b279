"""One reader of a stream of tars: clips in order, shuffled in blocks, and a position from which it goes on.

A reader goes through its tars from front to back. Clips are delivered by blocks of `data.shuffle_buffer` clips, or
fewer where `BLOCK_BYTES` are reached: each block is a permutation keyed by the place of its first clip, and while
one is delivered the next is read, clip for clip. So where a block begins and how many of its clips were delivered says
all: a reader that starts there reads the tar again from its front, passes over the clips before, and has the same
blocks again. A tar that is refused is an item of the stream like a clip.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from vidit import keys
from vidit.data.limits import ClipError, ShardError
from vidit.data.storage import File
from vidit.data.stream_file import opened
from vidit.data.stream_tars import Tars
from vidit.data.tar import (
    CAPTION_SUFFIXES,
    VIDEO_SUFFIXES,
    Limits,
    Member,
    Sequential,
    key_of,
    members_of,
    parse_sidecar,
)

BLOCK_BYTES = 1 << 30
"""Of the clips of a block; the last one may exceed it."""
LIMITS = Limits(max_members=400_000)
"""The keys of a tar are remembered while it is read, so there are fewer than an index could have."""


@dataclass(frozen=True, slots=True)
class Item:
    """What stands in a stream: clip `ordinal` of the tar at `place`, its members by suffix; or, with `refused`, a tar
    that could not be read further, and why.
    """

    place: int
    ordinal: int
    name: str
    members: Mapping[str, bytes]
    refused: str = ""

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.members.values()))

    @property
    def number(self) -> int:
        """A number of its own: a tar has fewer than 2^20 clips."""
        return self.place << 20 | self.ordinal

    def video(self) -> bytes:
        """ClipError unless it has exactly one video."""
        videos = [suffix for suffix in self.members if suffix in VIDEO_SUFFIXES]
        if len(videos) != 1:
            held = " ".join(sorted(self.members))
            raise ClipError(
                f"it has {len(videos)} videos ({held}), exactly 1 was expected; latents are read without data.streaming"
            )
        return self.members[videos[0]]

    def caption(self) -> str | None:
        """The caption of the .json if it has one, else the .txt; None without any. ClipError for what is no text."""
        try:
            if "json" in self.members:
                caption = parse_sidecar(f"{self.name}.json", self.members["json"], False).get("caption")
                if isinstance(caption, str):
                    return caption
            if "txt" in self.members:
                return str(parse_sidecar(f"{self.name}.txt", self.members["txt"])["caption"])
        except ShardError as error:
            raise ClipError(str(error)) from error
        return None


class Position(NamedTuple):
    """Where a reader stands: its block begins at clip `ordinal` of the tar at `place`, `delivered` of it are done."""

    place: int
    ordinal: int = 0
    delivered: int = 0


@dataclass
class _Block:
    items: list[Item]
    num_bytes: int = 0

    def add(self, item: Item) -> None:
        self.items.append(item)
        self.num_bytes += item.num_bytes


class Reader:
    """One of `stride` readers, from a position on; endless. Raises StorageError."""

    def __init__(self, tars: Tars, seed: int, stride: int, at: Position, buffer: int) -> None:
        self.tars, self.seed, self.stride, self.size = tars, seed, stride, max(1, buffer)
        self._source = self._items(at.place, at.ordinal)
        self._next = _Block([])
        self._block: list[Item | None] = []
        self._start, self._delivered = at, 0
        if at.delivered:
            self._turn()
            self._delivered = at.delivered
            self._block[: at.delivered] = [None] * at.delivered

    def take(self) -> Item:
        """The next item; afterwards `position` is the one behind it."""
        if self._delivered == len(self._block):
            self._turn()
        item = self._block[self._delivered]
        assert item is not None
        self._block[self._delivered] = None
        self._delivered += 1
        if not self._full:
            self._next.add(next(self._source))
        return item

    @property
    def position(self) -> Position:
        if self._delivered == len(self._block) and self._next.items:
            return Position(*_stand(self._next.items[0]))
        return self._start._replace(delivered=self._delivered)

    @property
    def _full(self) -> bool:
        return len(self._next.items) >= self.size or self._next.num_bytes >= BLOCK_BYTES

    def _turn(self) -> None:
        """Complete the next block and begin to deliver it."""
        while not self._full:
            self._next.add(next(self._source))
        block, self._next = self._next.items, _Block([])
        self._start, self._delivered = Position(*_stand(block[0])), 0
        order = keys.generator(self.seed, "shuffle buffer", *_stand(block[0])).permutation(len(block))
        self._block = [block[i] for i in order]

    def _items(self, place: int, skip: int) -> Iterator[Item]:
        while True:
            name, ordinal = self.tars.name(place), -1
            try:
                for item in clips_in(self.tars.file(place), skip):
                    ordinal = item.ordinal
                    yield replace(item, place=place, name=f"{name}/{item.name}")
            except ShardError as error:
                # After the last clip that came: what was passed over before a position is passed over again.
                yield Item(place, max(ordinal + 1, skip), name, {}, str(error))
            place, skip = place + self.stride, 0


def _stand(item: Item) -> tuple[int, int]:
    return item.place, item.ordinal


def clips_in(tar: File, skip: int = 0) -> Iterator[Item]:
    """The clips of a tar in its order, each held in memory, but for the first `skip`, of which headers alone are read.

    Members of a clip stand one after another. Raises ShardError, StorageError.
    """
    with opened(tar) as (file, num_bytes):
        ordinal, key, held = -1, None, dict[str, bytes]()
        seen: set[str] = set()
        for member in members_of(file, tar, num_bytes, LIMITS):
            own, suffix = key_of(member)
            if own != key:
                if key is not None and ordinal >= skip:
                    yield Item(0, ordinal, key, held)
                if own in seen:
                    raise ShardError(f"{tar}: the members of clip {own!r} do not stand together; sort the tar by name")
                seen.add(own)
                ordinal, key, held = ordinal + 1, own, {}
            if suffix in held:
                raise ShardError(f"{tar}: member {member.name!r} is there twice; make the tar again")
            # Of a clip with several videos, which is none, one is held.
            is_wanted = suffix in CAPTION_SUFFIXES or (suffix in VIDEO_SUFFIXES and not VIDEO_SUFFIXES & held.keys())
            held[suffix] = _content(file, member, tar) if ordinal >= skip and is_wanted else b""
        if key is None:
            raise ShardError(f"{tar}: the tar is empty, one clip or more was expected; leave it out")
        if ordinal >= skip:
            yield Item(0, ordinal, key, held)


def _content(file: Sequential, member: Member, tar: File) -> bytes:
    file.seek(member.offset)
    content: bytes = file.read(member.size)
    if len(content) != member.size:
        raise ShardError(f"{tar}: truncated: {member.name} has {len(content)} of {member.size} bytes")
    return content
