"""Stored scores: ``shard-000000.scores.jsonl`` beside each tar, a header and one row a clip in the index's order.

A row holds the size and CRC-32 of the video that it is of, so scores of a clip that was packed anew under the same
key do not count, and scores by the name and version of what computed them. While a shard is being scored its rows
are appended to ``shard-000000.scores.partial.jsonl``; the file itself appears when it is whole. Tars and indexes
are only read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vidit.data.shards import ClipRef
from vidit.whole_file import read_rows, write_whole

FORMAT, VERSION = "vidit-scores", 1
CURE = "run `vidit score` again"


@dataclass(frozen=True, slots=True)
class Row:
    """What is known of one clip. ``by``: scorer ("name@version") -> score -> number; empty where ``fault`` is set."""

    key: str
    video: tuple[int, int | None]
    """(bytes, CRC-32) of the video that was scored."""
    by: Mapping[str, Mapping[str, float]]
    fault: str = ""
    """Why the clip cannot be decoded, if so."""
    cut_frames: tuple[int, ...] = ()
    hash: str = ""
    """Hexadecimal, of 192 bits."""
    duplicate_of: str | None = None
    duplicate_distance: int | None = None
    """Bits by which the two hashes differ."""

    def lacks(self, scorers: Iterable[str]) -> list[str]:
        """Those of ``scorers`` that have not looked at the clip; none can at one that does not decode."""
        return [] if self.fault else [scorer for scorer in scorers if scorer not in self.by]

    def joined(self, new: Row) -> Row:
        """This row with what ``new`` adds; of two versions of one scorer the newer computation counts."""
        if self.video != new.video or self.fault or new.fault:
            return new
        renewed = {scorer.rpartition("@")[0] for scorer in new.by}
        kept = {scorer: scores for scorer, scores in self.by.items() if scorer.rpartition("@")[0] not in renewed}
        base = new if new.hash else self
        return replace(base, by={**kept, **new.by})


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Which search the ``duplicate_of`` of a shard come from: it looked at all clips, not at one shard."""

    max_distance: int
    sha256: str
    """Over the keys and hashes of every clip."""


@dataclass(slots=True)
class ShardScores:
    """The content of one file."""

    rows: dict[str, Row] = field(default_factory=dict)
    duplicates: Duplicates | None = None


def shard_of(ref: ClipRef) -> Path:
    """The tar that a clip lies in, beside which its scores are. ValueError for one behind a URL."""
    if not isinstance(ref.shard_path, Path):
        raise ValueError(f"{ref.shard_path}: scores are kept beside local shards only; score and select a local copy")
    return ref.shard_path


def video_of(ref: ClipRef) -> tuple[int, int | None]:
    """What ties a row to its clip."""
    return ref.video_size, ref.video_crc32


def rounded(value: float) -> float:
    """Five significant digits: what a score is worth, without the noise of the last bits."""
    return float(f"{value:.5g}")


def scores_path(shard: Path) -> Path:
    return shard.with_suffix(".scores.jsonl")


def partial_path(shard: Path) -> Path:
    return shard.with_suffix(".scores.partial.jsonl")


def line_of(row: Row) -> str:
    """A row's line, without what is empty."""
    content = {name: value for name, value in asdict(row).items() if value not in ("", (), None) or name == "video"}
    return json.dumps(content, ensure_ascii=False) + "\n"


def read_shard_scores(shard: Path) -> ShardScores:
    """What is stored of a shard; empty without a file. ValueError for a damaged one."""
    path = scores_path(shard)
    if not path.is_file():
        return ShardScores()
    try:
        header, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        if (header["format"], header["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {header['format']} {header['version']}, this version reads {FORMAT} {VERSION}")
        duplicates = Duplicates(**header["duplicates"]) if header["duplicates"] else None
        return ShardScores({row.key: row for row in map(_row, lines)}, duplicates)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); delete it and {CURE}") from error


def read_partial(shard: Path) -> list[Row]:
    """The whole rows that an unfinished run left."""
    known = {item.name for item in fields(Row)}
    return [
        _row(content) for content in read_rows(partial_path(shard)) if {"key", "video", "by"} <= set(content) <= known
    ]


def write_shard_scores(shard: Path, refs: Sequence[ClipRef], scores: ShardScores) -> None:
    """Write the file whole; nothing where it holds the same already."""
    rows = [scores.rows[ref.key] for ref in refs]
    header = {
        "format": FORMAT,
        "version": VERSION,
        "scorers": sorted({scorer for row in rows for scorer in row.by}),
        "duplicates": asdict(scores.duplicates) if scores.duplicates else None,
    }
    text = json.dumps(header) + "\n" + "".join(map(line_of, rows))
    path = scores_path(shard)
    if not path.is_file() or path.read_bytes() != text.encode():
        write_whole(path, text)


def _row(content: dict[str, Any]) -> Row:
    size, crc32 = content["video"]
    cut_frames = tuple(content.get("cut_frames", ()))
    return Row(**{**content, "video": (size, crc32), "cut_frames": cut_frames})
