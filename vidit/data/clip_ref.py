"""One clip of a data set: where it lies, and what it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vidit.data.storage import File
from vidit.data.tar import Member

CRCS = frozenset({"video_crc32", "json_crc32"})
OPTIONAL = CRCS | {"video_sha256"}
"""What an index that an earlier version wrote may lack."""


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

    @property
    def video(self) -> Member:
        return Member(f"{self.key}.{self.video_suffix}", self.video_offset, self.video_size, self.video_crc32)

    @property
    def caption(self) -> Member:
        return Member(f"{self.key}.{self.caption_suffix}", self.json_offset, self.json_size, self.json_crc32)


IN_INDEX = tuple(item.name for item in fields(ClipRef) if item.name not in ("shard_path", "allow_empty_caption"))
"""The fields of a row of an index."""


def ref_of(shard: File, key: str, video: Member, caption: Member, facts: Mapping[str, Any]) -> ClipRef:
    """One clip from where its members lie and from ``facts``, the other fields of ClipRef."""
    return ClipRef(shard, key, video.offset, video.size, caption.offset, caption.size, **facts)


def row_of(ref: ClipRef) -> str:
    """A clip's line of the index."""
    return json.dumps({name: getattr(ref, name) for name in IN_INDEX}, ensure_ascii=False) + "\n"
