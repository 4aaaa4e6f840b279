"""Score a whole data set, in worker processes, picking up where an earlier run was stopped.

Contract: the files written are a function of the data set, the plug-ins and the distance alone: not of the number
of workers, nor of how often the run was killed on the way.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from vidit.data.curation.duplicates import MAX_DISTANCE, find_duplicates
from vidit.data.curation.plugin import load_plugin
from vidit.data.curation.rows import (
    Duplicates,
    Row,
    ShardScores,
    line_of,
    partial_path,
    read_partial,
    read_shard_scores,
    shard_of,
    video_of,
    write_shard_scores,
)
from vidit.data.curation.score_clip import BUILT_IN, Task, score_clip, unscored
from vidit.data.shards import ClipRef, read_index
from vidit.data.tar import LATENT_SUFFIX
from vidit.data.workers import mapped
from vidit.whole_file import full_disk_explained, write_whole

DISTANCE = 12
"""Bits of 192. Of 24 real clips made smaller, larger or slower all but two of 72 copies lie within; two clips of one
person before one wall, who says two things, are 14 apart, unrelated clips 56 and more."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ScoreReport:
    """What a run did: clips in all, scored by it, that cannot be decoded (key, reason), that are copies."""

    num_clips: int
    num_scored: int
    faults: tuple[tuple[str, str], ...]
    num_duplicates: int


def score_set(
    folder: Path,
    plugins: Sequence[str] = (),
    *,
    max_distance: int = DISTANCE,
    workers: int = 1,
    progress: Progress = lambda done, total: None,
) -> ScoreReport:
    """Write the scores of every clip of ``folder`` beside its shards; what is there already is not computed again.

    ``plugins`` are named as ``vidit.data.curation.plugin`` says; ``max_distance`` in bits makes two clips copies;
    ``progress`` hears (clips done, clips in all). Raises ValueError for wrong arguments, RuntimeError where a
    plug-in fails or another process scores the same folder, ShardError for a damaged data set.
    """
    if not 0 <= max_distance <= MAX_DISTANCE or workers < 0:
        raise ValueError(f"max_distance={max_distance} must be 0 to {MAX_DISTANCE}, workers={workers} 0 or more")
    if len(set(plugins)) < len(plugins):
        raise ValueError(f"plug-ins {' '.join(plugins)}: one is named twice; name each once")
    scorers = {BUILT_IN: "", **{load_plugin(name).scorer: name for name in plugins}}
    refs = read_index(folder)
    if any(ref.video_suffix == LATENT_SUFFIX for ref in refs):
        raise ValueError(f"{folder} holds latents, which have no picture to score; score the videos they were made of")
    shards = {shard: list(group) for shard, group in itertools.groupby(refs, key=shard_of)}
    with _only_one(folder), full_disk_explained(folder):
        stored = {shard: _stored(shard, group) for shard, group in shards.items()}
        tasks = {shard: _tasks(group, stored[shard], scorers) for shard, group in shards.items()}
        num_scored = sum(map(len, tasks.values()))
        _score(shards, stored, tasks, workers, lambda done: progress(len(refs) - num_scored + done, len(refs)))
        _mark_duplicates(refs, stored, max_distance)
        for shard, group in shards.items():
            write_shard_scores(shard, group, stored[shard])
    rows = [row for scores in stored.values() for row in scores.rows.values()]
    faults = tuple((row.key, row.fault) for row in rows if row.fault)
    return ScoreReport(len(refs), num_scored, faults, sum(row.duplicate_of is not None for row in rows))


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise RuntimeError(f"another process scores {folder}; wait for it") from None
    finally:
        os.close(descriptor)


def _stored(shard: Path, refs: Sequence[ClipRef]) -> ShardScores:
    """What is known of the clips as they are now, an unfinished run's rows among it."""
    scores = read_shard_scores(shard)
    for row in read_partial(shard):
        scores.rows[row.key] = scores.rows[row.key].joined(row) if row.key in scores.rows else row
    current = {ref.key: video_of(ref) for ref in refs}
    scores.rows = {key: row for key, row in scores.rows.items() if current.get(key) == row.video}
    return scores


def _tasks(refs: Sequence[ClipRef], stored: ShardScores, scorers: dict[str, str]) -> list[Task]:
    tasks = []
    for ref in refs:
        row = stored.rows.get(ref.key)
        # A fault counts for one version of ours, which decodes: another may get further.
        known = row is not None and (not row.fault or BUILT_IN in row.by)
        lacking = row.lacks(scorers) if row is not None and known else list(scorers)
        if lacking:
            tasks.append((ref, tuple(scorers[s] for s in lacking if s != BUILT_IN), BUILT_IN in lacking))
    return tasks


class _Names:
    """Each scorer must give every clip the same scores, and no two may use one name. Found at once, not at the end."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[str, set[str]]] = {}
        self._owner: dict[str, str] = {}

    def check(self, row: Row) -> None:
        """RuntimeError, naming clips, scorers and the score."""
        for scorer, scores in row.by.items() if not row.fault else ():
            if scorer not in self._first:
                self._claim(scorer, scores)
            key, names = self._first.setdefault(scorer, (row.key, set(scores)))
            if names != set(scores):
                raise RuntimeError(
                    f"{scorer} gave {' '.join(sorted(names))} for clip {key}, {' '.join(sorted(scores))} for "
                    f"{row.key}; a plug-in must give the same scores for each clip"
                )

    def _claim(self, scorer: str, names: Iterable[str]) -> None:
        for name in names:
            other = self._owner.setdefault(name, scorer)
            if other.rpartition("@")[0] != scorer.rpartition("@")[0]:
                raise RuntimeError(f"{other} and {scorer} both give a score {name!r}; rename it in the plug-in")


def _score(
    shards: dict[Path, list[ClipRef]],
    stored: dict[Path, ShardScores],
    tasks: dict[Path, list[Task]],
    workers: int,
    done: Callable[[int], None],
) -> None:
    """Compute every row that is missing; a shard's file is written as soon as it is whole."""
    results = mapped(score_clip, [task for group in tasks.values() for task in group], workers, unscored)
    count, names = itertools.count(1), _Names()
    for row in (row for scores in stored.values() for row in scores.rows.values()):
        names.check(row)
    for shard, group in tasks.items():
        rows, path = stored[shard].rows, partial_path(shard)
        if group:
            # Written anew first: a killed run may have left half a line at its end.
            write_whole(path, "".join(map(line_of, rows.values())))
            with path.open("a", encoding="utf-8", buffering=1) as file:
                for _, row in zip(group, results, strict=False):
                    joined = rows[row.key].joined(row) if row.key in rows else row
                    names.check(joined)
                    rows[row.key] = joined
                    file.write(line_of(row))
                    done(next(count))
            stored[shard].duplicates = None
            write_shard_scores(shard, shards[shard], stored[shard])
        path.unlink(missing_ok=True)


def _mark_duplicates(refs: Sequence[ClipRef], stored: dict[Path, ShardScores], max_distance: int) -> None:
    """Fill in ``duplicate_of``; of several copies the one with most pixels is kept, then the first."""
    found = [(ref, stored[shard_of(ref)].rows[ref.key]) for ref in refs]
    digest = hashlib.sha256("".join(f"{row.key}\0{row.hash}\n" for _, row in found).encode()).hexdigest()
    hashed = [(ref, row) for ref, row in found if row.hash]
    hashed.sort(key=lambda pair: -pair[0].width * pair[0].height)
    matches = find_duplicates([int(row.hash, 16) for _, row in hashed], max_distance)
    for (ref, row), match in zip(hashed, matches, strict=True):
        original = None if match is None else hashed[match[0]][1].key
        distance = None if match is None else match[1]
        marked: Row = replace(row, duplicate_of=original, duplicate_distance=distance)
        stored[shard_of(ref)].rows[ref.key] = marked
    for scores in stored.values():
        scores.duplicates = Duplicates(max_distance, digest)
