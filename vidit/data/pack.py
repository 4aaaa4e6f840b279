"""Make a data set of shards from a folder of video files.

Contract: the shards are a pure function of the inputs, byte for byte, whatever the number of workers. A clip
that is in a data set was decoded once from its first frame to its last, so a training run does not meet a broken
one hours later; what was left out is listed with its reason in ``pack_report.json``.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vidit.data.captions import CaptionError, clean_caption
from vidit.data.limits import ClipError
from vidit.data.pack_report import PackReport
from vidit.data.shard_writer import ShardWriter
from vidit.data.sources import Source, caption_rows, find_sources
from vidit.data.staging import staged
from vidit.data.tar import VIDEO_SUFFIXES, Limits
from vidit.data.video import VideoInfo, verify
from vidit.data.workers import mapped


@dataclass(frozen=True, slots=True)
class _Rules:
    min_frames: int
    min_side: int
    allow_empty_captions: bool


@dataclass(frozen=True, slots=True)
class _Checked:
    """The verdict on one file: a sidecar, or a reason against it."""

    sidecar: dict[str, Any] | None
    reason: str = ""
    changes: tuple[str, ...] = ()
    sha256: str = ""


def pack(
    source: Path,
    out: Path,
    *,
    captions: Path | None = None,
    clips_per_shard: int = 1000,
    min_frames: int = 1,
    min_side: int = 16,
    allow_empty_captions: bool = False,
    overwrite: bool = False,
    workers: int = 1,
) -> PackReport:
    """Check every video below ``source`` and write those that hold into shards in ``out``.

    Captions come from ``captions`` (by default ``clips.jsonl`` in ``source``; one object a line with
    ``file``, relative to ``source``, and ``caption``; its other fields go to the sidecar's ``origin``), else
    from a ``.txt`` or ``.json`` of the same stem. ``min_side`` is in pixels as shown. Raises ValueError for
    wrong arguments, a malformed caption file, a folder without one usable clip, and for an ``out`` that holds
    other content, unless ``overwrite``; files that are not ours are never removed.
    """
    if clips_per_shard < 1 or min_frames < 1 or min_side < 1 or workers < 0:
        raise ValueError(
            f"clips_per_shard={clips_per_shard}, min_frames={min_frames}, min_side={min_side} must be 1 or "
            f"more, workers={workers} 0 or more"
        )
    _check_folders(source, out)
    rows = caption_rows(source, captions)
    sources = find_sources(source, rows)
    if not sources:
        raise ValueError(f"{source} holds no video; suffixes read: {' '.join(sorted(VIDEO_SUFFIXES))}")
    rules = _Rules(min_frames, min_side, allow_empty_captions)
    unused = tuple(sorted(set(rows) - {item.name for item in sources}))
    with staged(out, overwrite) as stage:
        checks = mapped(functools.partial(_check, rules=rules), sources, workers)
        with ShardWriter(stage.folder, clips_per_shard, allow_empty_captions=allow_empty_captions) as writer:
            report = _write(writer, sources, checks, unused)
        report.write(stage.folder)
        return replace(report, unchanged=stage.publish())


def _check_folders(source: Path, out: Path) -> None:
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder; name the folder that holds the videos")
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{out} lies inside {source}, so the next run would read it; write elsewhere")


def _check(source: Source, rules: _Rules) -> _Checked:
    try:
        caption, changes = clean_caption(source.caption, allow_empty=rules.allow_empty_captions)
        video = _read(source.path)
        info = verify(video)
    except (CaptionError, ClipError) as error:
        return _Checked(None, str(error))
    reason = _shortfall(info, rules)
    if reason:
        return _Checked(None, reason)
    sidecar = {
        "caption": caption,
        "fps": info.fps,
        "num_frames": info.num_frames,
        "width": info.width,
        "height": info.height,
        "codec": info.codec,
        "file": source.name,
        "origin": source.origin,
    }
    return _Checked(sidecar, "", changes, hashlib.sha256(video).hexdigest())


def _read(path: Path) -> bytes:
    limit = Limits().max_video_bytes
    try:
        num_bytes = path.stat().st_size
        if num_bytes > limit:
            raise ClipError(f"{num_bytes} bytes, the limit is {limit}; cut the file into clips first")
        return path.read_bytes()
    except OSError as error:
        raise ClipError(f"cannot be read: {error.strerror}") from error


def _shortfall(info: VideoInfo, rules: _Rules) -> str:
    if info.num_frames < rules.min_frames:
        return f"{info.num_frames} frames, min_frames is {rules.min_frames}"
    if min(info.width, info.height) < rules.min_side:
        return f"{info.width}x{info.height} pixels, min_side is {rules.min_side}"
    return ""


def _write(
    writer: ShardWriter, sources: list[Source], checks: Iterator[_Checked], unused: tuple[str, ...]
) -> PackReport:
    kept, rejected, cleaned = [], [], []
    for source, check in zip(sources, checks, strict=True):
        if check.sidecar is None:
            rejected.append((source.name, check.reason))
        else:
            video = _read(source.path)
            if hashlib.sha256(video).hexdigest() != check.sha256:
                raise RuntimeError(f"{source.path} changed while it was packed; run again when it is still")
            writer.add(source.key, video, check.sidecar, source.path.suffix[1:].lower())
            kept.append(source.name)
        if check.changes:
            cleaned.append((source.name, check.changes))
    if not kept:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected[:5])
        raise ValueError(f"none of {len(sources)} files can be used, so nothing was written: {reasons}")
    manifest = writer.close()
    return PackReport(
        tuple(kept), tuple(rejected), tuple(cleaned), unused, len(manifest["shards"]), manifest["num_bytes"]
    )
