"""Write clips into tar shards, with an index beside each, and the columns of all clips and a manifest at the end.

Where a shard ends depends on the sizes of the clips alone, so it can be known before a video is read (``is_full``).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from vidit.data.clip_ref import ref_of, row_of
from vidit.data.column_file import write_columns
from vidit.data.columns import Columns
from vidit.data.index_rows import read_rows_of
from vidit.data.manifest import COLUMNS, index_path, is_ours, sha256_of, write_manifest
from vidit.data.shards import facts_of
from vidit.data.tar import BLOCK, VIDEO_SUFFIXES, Limits, ShardError, padded, scan, suffix_of, video_of
from vidit.whole_file import write_whole

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,89}")


@dataclass(slots=True)
class _Shard:
    """The shard that is being written."""

    path: Path
    partial: Path
    file: BinaryIO
    tar: Any
    num_bytes: int = 0
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ShardLimits:
    """How large a shard grows: up to ``max_clips``, and up to ``max_bytes`` unless one clip alone is larger."""

    max_clips: int = 1000
    max_bytes: int = 1 << 30

    def is_full(self, num_clips: int, num_bytes: int, more_bytes: int) -> bool:
        """Whether a shard of so many clips and bytes ends before a clip of ``more_bytes``."""
        return num_clips >= self.max_clips or (num_clips > 0 and num_bytes + more_bytes > self.max_bytes)


def sidecar_text(sidecar: Mapping[str, Any]) -> bytes:
    """The bytes of a sidecar, the same for the same content. ValueError for what JSON cannot hold."""
    return json.dumps(dict(sidecar), sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


def bytes_in_tar(*sizes: int) -> int:
    """What members of these sizes take up in a tar, headers included."""
    return sum(BLOCK + padded(size) for size in sizes)


class ShardWriter:
    """Writes clips in the order in which they are added; a context manager.

    A shard appears under its name when it is whole; the manifest appears on ``close``. After an exception in
    the ``with`` block the unfinished shard and the manifest are not written. Without ``allow_empty_captions``
    a reader takes an empty caption for a fault of its clip. With ``resume`` the folder may hold shards of an earlier
    try: those that are adopted stay, all others are replaced, or removed on ``close``.
    """

    def __init__(
        self,
        out_dir: Path,
        max_clips_per_shard: int = 1000,
        max_bytes: int = 1 << 30,
        allow_empty_captions: bool = False,
        resume: bool = False,
    ) -> None:
        if max_clips_per_shard < 1 or max_bytes < 1:
            raise ValueError(f"max_clips_per_shard={max_clips_per_shard}, max_bytes={max_bytes}; use 1 or more")
        out_dir.mkdir(parents=True, exist_ok=True)
        present = sorted(path.name for path in out_dir.iterdir() if is_ours(path.name))
        if present and not resume:
            raise ShardError(f"{out_dir} already holds {present[0]}; write to an empty folder")
        self._out_dir, self._limits = out_dir, ShardLimits(max_clips_per_shard, max_bytes)
        self._allow_empty_captions = allow_empty_captions
        self._keys: set[str] = set()
        self._done: list[dict[str, Any]] = []
        self._shard: _Shard | None = None

    @property
    def next_path(self) -> Path:
        """Where the shard that is being written, or else the next one, will lie."""
        return self._out_dir / f"shard-{len(self._done):06d}.tar"

    def add(self, key: str, video: bytes, sidecar: Mapping[str, Any], suffix: str = "mp4") -> str:
        """Append one clip and return the SHA-256 of its video. ``sidecar`` needs a ``caption``; a width, height, fps
        or num_frames that it lacks is probed for the index. Raises ValueError for a bad key, suffix or sidecar,
        ClipError from the probe.
        """
        if not _KEY.fullmatch(key):
            raise ValueError(f"key {key!r} is not 1 to 90 letters, digits, - and _ starting with no dash")
        if key in self._keys:
            raise ValueError(f"key {key!r} was added before; every clip needs its own")
        if suffix not in VIDEO_SUFFIXES:
            raise ValueError(f"{key}: suffix {suffix!r} is not one of {' '.join(sorted(VIDEO_SUFFIXES))}")
        if not isinstance(sidecar.get("caption"), str):
            raise ValueError(f"{key}: the sidecar has no caption text")
        text = sidecar_text(sidecar)
        facts = facts_of(sidecar, lambda: video)
        size, digest = bytes_in_tar(len(video), len(text)), hashlib.sha256(video).hexdigest()
        shard = self._room_for(size)
        shard.tar.write({"__key__": key, "json": text, suffix: video})
        shard.facts[key] = facts | {
            "caption_chars": len(sidecar["caption"]),
            "video_crc32": zlib.crc32(video),
            "json_crc32": zlib.crc32(text),
            "video_sha256": digest,
        }
        shard.num_bytes += size
        self._keys.add(key)
        return digest

    def cut(self) -> dict[str, Any]:
        """End the shard that is being written, which holds a clip or more, and return its row of the manifest."""
        assert self._shard
        self._finish(self._shard)
        return self._done[-1]

    def adopt(self, row: dict[str, Any]) -> None:
        """Take the shard at ``next_path``, whose row of the manifest this is, as it lies there with its index."""
        assert self._shard is None
        assert row["name"] == self.next_path.name
        self._done.append(row)

    def close(self) -> dict[str, Any]:
        """Finish the last shard, write the manifest and return it. Raises ValueError if no clip was added."""
        if self._shard is not None:
            self._finish(self._shard)
        if not self._done:
            raise ValueError(f"no clip was added, so {self._out_dir} would be an empty data set")
        for path in sorted(self._out_dir.glob("shard-*"))[2 * len(self._done) :]:
            path.unlink()
        # From the rows on disk, so that what an earlier try wrote counts as what this one did.
        shards = [self._out_dir / row["name"] for row in self._done]
        listed = write_columns(self._out_dir / COLUMNS, Columns.joined(list(map(read_rows_of, shards))))
        rows = [
            {**row, "index_bytes": index_path(shard).stat().st_size}
            for row, shard in zip(self._done, shards, strict=True)
        ]
        return write_manifest(self._out_dir, rows, self._allow_empty_captions, listed)

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
        if shard and self._limits.is_full(len(shard.facts), shard.num_bytes, size):
            self._finish(shard)
            shard = None
        return shard or self._start()

    def _start(self) -> _Shard:
        # Imported here because it costs a second, which a reader has no use for.
        from webdataset import TarWriter

        path = self.next_path
        partial = path.with_name(f".{path.name}.partial")
        file = partial.open("wb")
        # An open file, so that no name is ever taken for a `pipe:` command.
        tar = TarWriter(file, user="vidit", group="vidit", mode=0o444, encoder=False, mtime=0)
        self._shard = _Shard(path, partial, file, tar)
        return self._shard

    def _finish(self, shard: _Shard) -> None:
        shard.tar.close()
        shard.file.flush()
        os.fsync(shard.file.fileno())
        shard.file.close()
        # The reader's own scan gives the offsets, so what was written is proven readable before it is named.
        rows = []
        for key, members in scan(shard.partial, Limits(max_video_bytes=1 << 62)).items():
            video, caption = video_of(shard.path, key, members), members["json"]
            facts = shard.facts[key] | {"video_suffix": suffix_of(video.name)}
            rows.append(ref_of(shard.path, key, video, caption, facts))
        digest, num_bytes = sha256_of(shard.partial), shard.partial.stat().st_size
        shard.partial.replace(shard.path)
        write_whole(index_path(shard.path), "".join(map(row_of, rows)))
        self._done.append({"name": shard.path.name, "num_bytes": num_bytes, "sha256": digest, "num_clips": len(rows)})
        self._shard = None
