"""The videos that a table names, by paths that are absolute or start at the table's own folder."""

from __future__ import annotations

from pathlib import Path

from vidit.data.candidates import Candidate, Found, place_of, with_keys
from vidit.data.caption_table import Columns, read_table
from vidit.data.tar import VIDEO_SUFFIXES


def find_in_table(table: Path, columns: Columns) -> Found:
    """Every row as a candidate; a row whose file is not there, or no video by its suffix, is rejected."""
    candidates, rejected = [], []
    for name, row in read_table(table, columns).items():
        candidate = None
        if Path(name).suffix[1:].lower() not in VIDEO_SUFFIXES:
            reason = f"its suffix is not one of {' '.join(sorted(VIDEO_SUFFIXES))}"
        elif place := place_of(table.parent / name):
            candidate = Candidate(place, name, "", row.caption, row.origin)
        else:
            reason = "no such file; paths are absolute, or start at the table's folder"
        if candidate:
            candidates.append(candidate)
        else:
            rejected.append((name, reason))
    if not candidates and not rejected:
        raise ValueError(f"{table} has no rows; give each video one")
    return Found(with_keys(candidates), tuple(sorted(rejected)))
