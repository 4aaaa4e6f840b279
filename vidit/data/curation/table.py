"""The stored scores of a data set as columns, and the clips that a config's rules keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vidit.data.curation.rows import Duplicates, Row, read_shard_scores, scores_path, shard_of, video_of
from vidit.data.selection import Score, select
from vidit.data.shards import ClipRef


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """Clips that could be scored, in the data set's order, one column a score; and those that could not."""

    refs: tuple[ClipRef, ...]
    columns: dict[str, list[Score]]
    faults: dict[str, str]
    """Key -> why the clip does not decode."""
    scorers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Selected:
    """What a run trains on, and what it does not: (key, reason); ``lines`` say so for a log."""

    refs: list[ClipRef]
    dropped: list[tuple[str, str]]
    lines: list[str]


def read_table(refs: Sequence[ClipRef]) -> ScoreTable:
    """The stored scores of the clips of one data set.

    Raises ValueError, naming the command that cures it, where scores are missing, are of other clips, or where
    a score is there for some clips only.
    """
    rows = _rows(refs)
    scored = [(ref, row) for ref, row in zip(refs, rows, strict=True) if not row.fault]
    names = {name: scorer for _, row in scored for scorer, scores in row.by.items() for name in scores}
    columns: dict[str, list[Score]] = {name: [] for name in sorted(names)}
    for ref, row in scored:
        flat = {name: value for scores in row.by.values() for name, value in scores.items()}
        for name, column in columns.items():
            if name not in flat:
                raise ValueError(
                    f"clip {ref.key} has no score {name!r}, others have: run `{_command(refs)}`"
                    + ("" if names[name].startswith("vidit@") else f" with --plugin {names[name].rpartition('@')[0]}")
                )
            column.append(flat[name])
    columns["duplicate_of"] = [row.duplicate_of for _, row in scored]
    scorers = tuple(sorted({scorer for _, row in scored for scorer in row.by}))
    faults = {row.key: row.fault for row in rows if row.fault}
    return ScoreTable(tuple(ref for ref, _ in scored), columns, faults, scorers)


def _command(refs: Sequence[ClipRef]) -> str:
    return f"vidit score {refs[0].shard_path.parent}"


def _rows(refs: Sequence[ClipRef]) -> list[Row]:
    shards = {shard_of(ref): None for ref in refs}
    stored = {}
    for shard in shards:
        if not scores_path(shard).is_file():
            raise ValueError(f"{shard} has no scores; run `{_command(refs)}` first")
        stored[shard] = read_shard_scores(shard)
    searches: set[Duplicates | None] = {scores.duplicates for scores in stored.values()}
    if len(searches) > 1 or None in searches:
        raise ValueError(f"the scores of {refs[0].shard_path.parent} are unfinished; run `{_command(refs)}` again")
    rows = []
    for ref in refs:
        row = stored[shard_of(ref)].rows.get(ref.key)
        if row is None or row.video != video_of(ref):
            raise ValueError(
                f"the scores beside {ref.shard_path} are not of its clip {ref.key}; run `{_command(refs)}`"
            )
        rows.append(row)
    return rows


def select_clips(refs: Sequence[ClipRef], rules: Sequence[str]) -> Selected:
    """The clips of one data set that ``rules`` keep; all of them, unread, without a rule.

    Quantiles are over the clips given. A clip that could not be scored is dropped. ValueError as from
    ``read_table`` and ``select``.
    """
    if not rules:
        return Selected(list(refs), [], [])
    table = read_table(refs)
    selection = select(table.columns, rules)
    kept = [ref for ref, keep in zip(table.refs, selection.keep, strict=True) if keep]
    dropped = [(ref.key, selection.reason(place)) for place, ref in enumerate(table.refs) if not selection.keep[place]]
    dropped += list(table.faults.items())
    lines = [verdict.line() for verdict in selection.verdicts]
    if table.faults:
        lines.append(f"select: {len(table.faults)} clips do not decode")
    lines.append(f"select keeps {len(kept)} of {len(refs)} clips")
    return Selected(kept, dropped, lines)
