"""Make a data set of shards from video files: a folder, a table, or tars (``vidit.data.sources``).

Contract: the shards are a pure function of the inputs, byte for byte, whatever the number of workers, and however
often the packing was killed and begun again. A clip that is in a data set was decoded once from its first frame to
its last, so a training run does not meet a broken one hours later; what was left out is listed with its reason in
``pack_report.json``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from vidit.data.candidates import Candidate, Found
from vidit.data.caption_table import Columns
from vidit.data.limits import ClipError
from vidit.data.pack_journal import Journal, recipe_of
from vidit.data.pack_report import PackReport
from vidit.data.pack_verdicts import Clip, Judge, Outcome, Rules, Watch
from vidit.data.shard_writer import ShardLimits, ShardWriter, bytes_in_tar, sidecar_text
from vidit.data.sources import find
from vidit.data.staging import Stage, staged


def pack(
    source: Path,
    out: Path,
    *,
    captions: Path | None = None,
    file_column: str | None = None,
    caption_column: str | None = None,
    clips_per_shard: int = 1000,
    min_frames: int = 1,
    min_side: int = 16,
    allow_empty_captions: bool = False,
    drop_duplicates: bool = False,
    overwrite: bool = False,
    workers: int = 1,
    watch: Watch = lambda _: None,
) -> PackReport:
    """Check every video of ``source`` and write those that hold into shards in ``out``.

    ``source``: a folder of videos, whose captions stand in ``captions`` (by default its ``clips.jsonl``), else in a
    ``.txt`` or ``.json`` of the same stem; a table, CSV, TSV, JSON lines or Parquet, with a row a video; a WebDataset
    tar, or a folder of them. A table has the columns ``file_column`` (default ``file``; relative to the table's
    folder, for ``captions`` to ``source``) and ``caption_column`` (``caption``); all others go to the sidecar's
    ``origin``. ``min_side`` is in pixels as shown. ``drop_duplicates`` keeps the first by key of the files with the
    same bytes. ``watch`` is called after every file.

    A packing that was killed goes on from where it was when it is called again: no file is decoded and no shard
    written a second time. Raises ValueError for wrong arguments, a malformed table, a source without one usable clip,
    and for an ``out`` that holds other content, unless ``overwrite``; files that are not ours are never removed.
    """
    if clips_per_shard < 1 or min_frames < 1 or min_side < 1 or workers < 0:
        raise ValueError(
            f"clips_per_shard={clips_per_shard}, min_frames={min_frames}, min_side={min_side} must be 1 or "
            f"more, workers={workers} 0 or more"
        )
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{out} lies inside {source}, so the next run would read it; write elsewhere")
    found = find(source, captions, Columns(file_column, caption_column))
    rules, limits = Rules(min_frames, min_side, allow_empty_captions, drop_duplicates), ShardLimits(clips_per_shard)
    with staged(out, overwrite, resume=True) as stage, Journal(stage.journal) as journal:
        judge = Judge(found, rules, journal, workers, watch)
        with (
            closing(judge.clips()) as clips,
            ShardWriter(
                stage.folder, clips_per_shard, allow_empty_captions=allow_empty_captions, resume=True
            ) as writer,
        ):
            for group in _groups(clips, limits):
                _write_shard(writer, group, journal)
            manifest = _closed(writer, judge.outcome, stage)
        report = _report(judge.outcome, found, manifest)
        report.write(stage.folder)
        return replace(report, unchanged=stage.publish())


def _groups(clips: Iterable[Clip], limits: ShardLimits) -> Iterator[list[Clip]]:
    """The clips of each shard; nothing of a video but its size decides where one ends."""
    group: list[Clip] = []
    num_bytes = 0
    for clip in clips:
        size = bytes_in_tar(clip.num_bytes, len(sidecar_text(clip.sidecar)))
        if limits.is_full(len(group), num_bytes, size):
            yield group
            group, num_bytes = [], 0
        group.append(clip)
        num_bytes += size
    if group:
        yield group


def _write_shard(writer: ShardWriter, group: list[Clip], journal: Journal) -> None:
    path = writer.next_path
    parts = [(clip.candidate.key, clip.candidate.suffix, clip.sha256, sidecar_text(clip.sidecar)) for clip in group]
    recipe = recipe_of(path.name, parts)
    finished = journal.finished(path, recipe)
    if finished:
        writer.adopt(finished)
        return
    journal.begin_shard(path.name)
    for clip in group:
        item = clip.candidate
        if writer.add(item.key, _read_again(item), clip.sidecar, item.suffix) != clip.sha256:
            journal.forget(item.place)
            raise RuntimeError(f"{item.place.path} changed while it was packed; run again when it is still")
    journal.end_shard(recipe, writer.cut())


def _read_again(item: Candidate) -> bytes:
    try:
        return item.place.read()
    except ClipError as error:
        raise RuntimeError(f"{item.name} was checked, and then {error}; run the same command again") from error


def _closed(writer: ShardWriter, outcome: Outcome, stage: Stage) -> dict[str, Any]:
    if not outcome.kept:
        stage.discard()
        reasons = "; ".join(f"{name}: {reason}" for name, reason in outcome.rejected[:5])
        raise ValueError(f"none of {len(outcome.rejected)} files can be used, so nothing was written: {reasons}")
    return writer.close()


def _report(outcome: Outcome, found: Found, manifest: dict[str, Any]) -> PackReport:
    return PackReport(
        kept=tuple(outcome.kept),
        rejected=tuple(outcome.rejected),
        cleaned=tuple(outcome.cleaned),
        duplicates=tuple(outcome.duplicates),
        captions_without_file=found.captions_without_file,
        num_shards=len(manifest["shards"]),
        num_bytes=manifest["num_bytes"],
    )
