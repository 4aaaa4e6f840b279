"""Make a data set of shards: from a folder of video files, or from procedural scenes.

Contract of both: the shards are a pure function of the inputs, byte for byte, whatever the number of workers.
A clip that is in a data set was decoded once from its first frame to its last, so a training run does not
meet a broken one hours later; what was left out is listed with its reason in ``pack_report.json``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from vidit.data import scenes
from vidit.data.captions import CaptionError, clean_caption
from vidit.data.shards import MANIFEST, VIDEO_SUFFIXES, Limits, ShardWriter
from vidit.data.video import ClipError, VideoInfo, encode_mp4, verify

REPORT = "pack_report.json"
Progress = Callable[[int, int], None]
"""Called with (clips done, clips in all)."""
_OURS = re.compile(rf"shard-\d{{6}}\.(tar|index\.jsonl)|{re.escape(MANIFEST)}|{REPORT}")
_MAX_KEY_CHARS = 80
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class PackReport:
    """What became of every file. ``unchanged``: the folder already held exactly these shards."""

    kept: tuple[str, ...]
    rejected: tuple[tuple[str, str], ...]
    """(file, reason)"""
    cleaned: tuple[tuple[str, tuple[str, ...]], ...]
    """(file, what was changed in its caption)"""
    captions_without_file: tuple[str, ...]
    num_shards: int
    num_bytes: int
    unchanged: bool = False


@dataclass(frozen=True, slots=True)
class _Source:
    """One video file and the caption that was found for it."""

    path: Path
    name: str
    key: str
    caption: bytes | str | None
    origin: dict[str, Any]


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
    progress: Progress | None = None,
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
    rows = _caption_rows(source, captions)
    sources = _sources(source, rows)
    if not sources:
        raise ValueError(f"{source} holds no video; suffixes read: {' '.join(sorted(VIDEO_SUFFIXES))}")
    rules = _Rules(min_frames, min_side, allow_empty_captions)
    unused = tuple(sorted(set(rows) - {item.name for item in sources}))
    with _staged(out, overwrite) as stage:
        checks = _mapped(functools.partial(_check, rules=rules), sources, workers)
        return _write(stage, sources, checks, clips_per_shard, unused, progress)


def pack_scenes(
    out: Path,
    num_clips: int,
    split: scenes.Split,
    seed: int,
    num_frames: int = 9,
    height: int = 64,
    width: int = 64,
    fps: int = 8,
    workers: int = 2,
    clips_per_shard: int = 1000,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Render, encode and write procedural clips (``vidit.data.scenes``); returns the manifest.

    Clip i is scene (seed, i, split), under the key ``scene-<split>-<i as 7 digits>``. ``workers`` processes
    render (0 or 1: this one does). Raises ValueError for wrong arguments or an ``out`` with other content.
    """
    if not 1 <= num_clips <= 10_000_000:
        raise ValueError(f"num_clips={num_clips} is outside 1 to 10000000")
    if height % 2 or width % 2:
        raise ValueError(f"{width}x{height} pixels cannot be stored; H.264 needs an even width and height")
    make = functools.partial(
        _scene_clip, seed=seed, split=split, num_frames=num_frames, height=height, width=width, fps=fps
    )
    with _staged(out, overwrite) as stage:
        with ShardWriter(stage.folder, clips_per_shard) as writer:
            for done, (key, video, sidecar) in enumerate(_mapped(make, range(num_clips), workers), start=1):
                writer.add(key, video, sidecar)
                if progress:
                    progress(done, num_clips)
        stage.publish()
        manifest: dict[str, Any] = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def print_report(report: PackReport) -> None:
    """Print a table of what was kept, and one of what was left out and why."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    total = Table("kept", "rejected", "captions cleaned", "shards", "MiB", title="vidit pack")
    counts = (len(report.kept), len(report.rejected), len(report.cleaned), report.num_shards)
    total.add_row(*map(str, counts), f"{report.num_bytes / 2**20:.1f}")
    console.print(total)
    if report.rejected:
        table = Table("rejected file", "reason")
        for name, reason in report.rejected:
            table.add_row(escape(name), escape(reason))
        console.print(table)
    changes = Counter(change for _, names in report.cleaned for change in names)
    for change, count in sorted(changes.items()):
        console.print(f"caption changes: {change} in {count}", highlight=False)
    for name in report.captions_without_file:
        console.print(f"caption without a file: {escape(name)}", highlight=False)
    if report.unchanged:
        console.print("the folder already held exactly this data set; nothing was written")


def _scene_clip(
    index: int, seed: int, split: scenes.Split, num_frames: int, height: int, width: int, fps: int
) -> tuple[str, bytes, dict[str, Any]]:
    scene = scenes.sample_scene(seed, index, split, num_frames=num_frames, height=height, width=width, fps=fps)
    sidecar = {
        "caption": scenes.caption(scene),
        "fps": fps,
        "num_frames": num_frames,
        "width": width,
        "height": height,
        "scene": scene.to_json(),
    }
    return f"scene-{split}-{index:07d}", encode_mp4(scenes.render(scene), fps), sidecar


def _mapped(function: Callable[[_Item], _Result], items: Iterable[_Item], workers: int) -> Iterator[_Result]:
    """``map`` over processes, in order."""
    if workers <= 1:
        yield from map(function, items)
        return
    # Not fork: the parent may have started OpenMP threads, whose locks a forked child never gets.
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, initializer=_start_worker) as pool:
        yield from pool.imap(function, items, chunksize=4)


def _start_worker() -> None:
    import torch

    torch.set_num_threads(1)


def _check_folders(source: Path, out: Path) -> None:
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder; name the folder that holds the videos")
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{out} lies inside {source}, so the next run would read it; write elsewhere")


def _caption_rows(source: Path, captions: Path | None) -> dict[str, dict[str, Any]]:
    """File name -> row of the caption list."""
    path = captions or source / "clips.jsonl"
    if not path.is_file():
        if captions:
            raise ValueError(f"{captions} is not a file; name a list of captions, one JSON object a line")
        return {}
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8", "replace"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("file"), str):
            raise ValueError(f"{path}, line {number} has no `file`; give each line `file` and `caption`")
        name = Path(row["file"]).as_posix()
        if name in rows:
            raise ValueError(f"{path}, line {number}: {name} was captioned before; give one line a file")
        rows[name] = row
    return rows


def _sources(source: Path, rows: dict[str, dict[str, Any]]) -> list[_Source]:
    """All videos below a folder, sorted by key; hidden files are editors' and file systems' litter."""
    paths = [path for path in source.rglob("*") if path.suffix[1:].lower() in VIDEO_SUFFIXES and path.is_file()]
    names = {path: path.relative_to(source) for path in paths}
    names = {path: name for path, name in names.items() if not any(part[0] == "." for part in name.parts)}
    plain = Counter(_plain_key(name) for name in names.values())
    found = []
    for path, name in names.items():
        key = _plain_key(name)
        # A key that had to be changed, or that two files share, is told apart by a hash of the name.
        if plain[key] > 1 or key != name.with_suffix("").as_posix():
            digest = hashlib.sha256(name.as_posix().encode("utf-8", "surrogateescape")).hexdigest()
            key = f"{key}-{digest[:8]}"
        found.append(_Source(path, name.as_posix(), key, *_caption_of(path, rows.get(name.as_posix()))))
    return sorted(found, key=lambda item: item.key)


def _plain_key(name: Path) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name.with_suffix("").as_posix()).lstrip("_-")[:_MAX_KEY_CHARS] or "clip"


def _caption_of(video: Path, row: dict[str, Any] | None) -> tuple[bytes | str | None, dict[str, Any]]:
    """(caption as found, the other fields that came with it)."""
    limit = Limits().max_caption_bytes
    text, sidecar = video.with_suffix(".txt"), video.with_suffix(".json")
    if row is None and text.is_file():
        with text.open("rb") as file:
            return file.read(limit), {}
    if row is None and sidecar.is_file():
        try:
            with sidecar.open("rb") as file:
                row = json.loads(file.read(limit).decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            return None, {}
    if not isinstance(row, dict):
        return None, {}
    caption = row.get("caption")
    origin = {name: value for name, value in row.items() if name not in ("caption", "file")}
    return caption if isinstance(caption, str) else None, origin


def _check(source: _Source, rules: _Rules) -> _Checked:
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
    stage: _Stage,
    sources: list[_Source],
    checks: Iterator[_Checked],
    clips_per_shard: int,
    unused: tuple[str, ...],
    progress: Progress | None,
) -> PackReport:
    kept, rejected, cleaned = [], [], []
    with ShardWriter(stage.folder, clips_per_shard) as writer:
        for done, (source, check) in enumerate(zip(sources, checks, strict=True), start=1):
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
            if progress:
                progress(done, len(sources))
        if not kept:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected[:5])
            raise ValueError(f"none of {len(sources)} files can be used, so nothing was written: {reasons}")
        manifest = writer.close()
    report = PackReport(
        tuple(kept), tuple(rejected), tuple(cleaned), unused, len(manifest["shards"]), manifest["num_bytes"]
    )
    content = {name: value for name, value in asdict(report).items() if name != "unchanged"}
    text = json.dumps(content, indent=1, ensure_ascii=True) + "\n"
    (stage.folder / REPORT).write_text(text, encoding="utf-8")
    unchanged = stage.publish()
    return PackReport(**{**{name: getattr(report, name) for name in content}, "unchanged": unchanged})


@dataclass(frozen=True, slots=True)
class _Stage:
    """A folder beside ``out`` that takes its place when it is whole."""

    folder: Path
    out: Path
    overwrite: bool

    def publish(self) -> bool:
        """Move everything into place; True if ``out`` had the same shards and keeps them."""
        old, new = self.out / MANIFEST, self.folder / MANIFEST
        held = [path for path in self.out.iterdir() if _OURS.fullmatch(path.name)]
        if old.is_file() and old.read_bytes() == new.read_bytes() and self._same_shards():
            if (self.folder / REPORT).exists():
                (self.folder / REPORT).replace(self.out / REPORT)
            return True
        if held and not self.overwrite:
            raise ValueError(f"{self.out} holds another data set; write elsewhere, or overwrite it on purpose")
        for path in sorted(held, key=lambda path: path.name != MANIFEST):
            path.unlink()
        # The manifest goes first and comes last, so that a half-moved folder never looks whole.
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == MANIFEST):
            path.replace(self.out / path.name)
        return False

    def _same_shards(self) -> bool:
        return all(
            (self.out / path.name).is_file() and _digest(self.out / path.name) == _digest(path)
            for path in self.folder.iterdir()
            if path.name != REPORT
        )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _staged(out: Path, overwrite: bool) -> Iterator[_Stage]:
    out.mkdir(parents=True, exist_ok=True)
    foreign = sorted(path.name for path in out.iterdir() if not _OURS.fullmatch(path.name))
    if foreign:
        raise ValueError(f"{out} holds {foreign[0]}, which is no part of a data set; write to an empty folder")
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield _Stage(folder, out, overwrite)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not any(out.iterdir()):
            out.rmdir()
