"""The stored scores of a data set as columns, and the clips that a config's rules keep.

Scores are read a shard at a time and kept as numbers: 8 bytes a clip and score.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vidit.data.clip_list import Clips
from vidit.data.clip_ref import ClipRef
from vidit.data.curation.rows import Duplicates, Row, read_shard_scores, scores_path, shard_of, video_of
from vidit.data.listing import Listing
from vidit.data.selection import Column, Score, select


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """Clips that could be scored, in the data set's order, one column a score; and those that could not."""

    refs: Sequence[ClipRef]
    columns: dict[str, Column]
    faults: dict[str, str]
    """Key -> why the clip does not decode."""
    scorers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Selected:
    """What a run trains on, and what it does not: (key, reason); ``lines`` say so for a log."""

    refs: Clips
    dropped: Listing[tuple[str, str]]
    lines: list[str]


@dataclass(slots=True)
class _Reader:
    """What has been read, clip by clip."""

    command: str
    columns: dict[str, array[float]] = field(default_factory=dict)
    scorer_of: dict[str, str] = field(default_factory=dict)
    duplicate_of: list[Score] = field(default_factory=list)
    first: str = ""
    """The key of the first clip that could be scored."""
    scored: array[int] = field(default_factory=lambda: array("q"))
    faults: dict[str, str] = field(default_factory=dict)

    def add(self, number: int, row: Row) -> None:
        """ValueError where a clip lacks a score that others have."""
        if row.fault:
            self.faults[row.key] = row.fault
            return
        flat = {name: value for scores in row.by.values() for name, value in scores.items()}
        for scorer, scores in row.by.items():
            for name in scores.keys() - self.columns.keys():
                self.scorer_of[name] = scorer
                if self.first:
                    raise self._lacking(self.first, name)
                self.columns[name] = array("d")
        self.first = self.first or row.key
        for name, column in self.columns.items():
            if name not in flat:
                raise self._lacking(row.key, name)
            column.append(flat[name])
        self.duplicate_of.append(row.duplicate_of)
        self.scored.append(number)

    def _lacking(self, key: str, name: str) -> ValueError:
        scorer = self.scorer_of[name]
        plugin = "" if scorer.startswith("vidit@") else f" with --plugin {scorer.rpartition('@')[0]}"
        return ValueError(f"clip {key} has no score {name!r}, others have: run `{self.command}`{plugin}")


def read_table(refs: Sequence[ClipRef]) -> ScoreTable:
    """The stored scores of the clips of one data set.

    Raises ValueError, naming the command that cures it, where scores are missing, are of other clips, or where
    a score is there for some clips only.
    """
    clips = Clips.of(refs)
    reader = _Reader(_command(clips))
    scorers: set[str] = set()
    searches: set[Duplicates | None] = set()
    for _, group in clips.by_shard():
        shard = shard_of(group[0])
        if not scores_path(shard).is_file():
            raise ValueError(f"{shard} has no scores; run `{reader.command}` first")
    number, problem = 0, None
    for _, group in clips.by_shard():
        stored = read_shard_scores(shard_of(group[0]))
        searches.add(stored.duplicates)
        for ref in group if problem is None else ():
            row = stored.rows.get(ref.key)
            try:
                if row is None or row.video != video_of(ref):
                    raise ValueError(
                        f"the scores beside {ref.shard_path} are not of its clip {ref.key}; run `{reader.command}`"
                    )
                reader.add(number, row)
            except ValueError as error:
                problem = error
                break
            scorers.update(() if row.fault else row.by)
            number += 1
    # Said first, since an unfinished scoring explains scores that are missing or old.
    if len(searches) > 1 or None in searches:
        raise ValueError(f"the scores of {clips[0].shard_path.parent} are unfinished; run `{reader.command}` again")
    if problem is not None:
        raise problem
    scored = clips.take(np.array(reader.scored, np.int64)) if reader.faults else clips
    columns: dict[str, Column] = {name: reader.columns[name] for name in sorted(reader.columns)}
    return ScoreTable(scored, {**columns, "duplicate_of": reader.duplicate_of}, reader.faults, tuple(sorted(scorers)))


def _command(refs: Sequence[ClipRef]) -> str:
    return f"vidit score {refs[0].shard_path.parent}"


def select_clips(refs: Sequence[ClipRef], rules: Sequence[str]) -> Selected:
    """The clips of one data set that ``rules`` keep; all of them, unread, without a rule.

    Quantiles are over the clips given. A clip that could not be scored is dropped. ValueError as from
    ``read_table`` and ``select``.
    """
    clips = Clips.of(refs)
    if not rules:
        return Selected(clips, Listing(), [])
    table = read_table(clips)
    scored, selection = Clips.of(table.refs), select(table.columns, rules)
    keep = np.array(selection.keep, bool)
    out = np.flatnonzero(~keep)
    dropped = Listing((len(out), lambda i: (scored.key(int(out[i])), selection.reason(int(out[i])))))
    lines = [verdict.line() for verdict in selection.verdicts]
    if table.faults:
        lines.append(f"select: {len(table.faults)} clips do not decode")
    kept = scored.take(np.flatnonzero(keep))
    lines.append(f"select keeps {len(kept)} of {len(clips)} clips")
    return Selected(kept, dropped + tuple(table.faults.items()), lines)
