"""The videos below a folder, and the captions that belong to them: from a table, or from a file beside each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vidit.data.candidates import Candidate, Found, place_of, plain_text, with_keys
from vidit.data.caption_table import Columns, Row, row_beside
from vidit.data.tar import VIDEO_SUFFIXES, Limits


def files_below(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    """Files of these suffixes, sorted; hidden ones are editors' and file systems' litter."""
    paths = [path for path in folder.rglob("*") if path.suffix[1:].lower() in suffixes]
    return sorted(path for path in paths if not any(part[0] == "." for part in path.relative_to(folder).parts))


def find_in_folder(folder: Path, rows: Mapping[str, Row], columns: Columns) -> Found:
    """All videos below a folder; ``rows``: file name, relative to it -> what a table says."""
    candidates, rejected = [], []
    for path in files_below(folder, VIDEO_SUFFIXES):
        place, name = place_of(path), plain_text(path.relative_to(folder).as_posix())
        if place:
            row = rows.get(name) or row_beside(_beside(path, ".json"), _beside(path, ".txt"), columns)
            candidates.append(Candidate(place, name, "", row.caption, row.origin))
        elif not path.is_dir():
            rejected.append((name, "no such file: a broken link" if path.is_symlink() else "no regular file"))
    if not candidates and not rejected:
        raise ValueError(f"{folder} holds no video; suffixes read: {' '.join(sorted(VIDEO_SUFFIXES))}, or tar")
    unused = tuple(sorted(set(rows) - {item.name for item in candidates}))
    return Found(with_keys(candidates), tuple(rejected), captions_without_file=unused)


def _beside(video: Path, suffix: str) -> bytes | None:
    """The start of the file of the same stem with this suffix, in small or capital letters."""
    for path in (video.with_suffix(suffix), video.with_suffix(suffix.upper())):
        if path.is_file():
            with path.open("rb") as file:
                return file.read(Limits().max_caption_bytes)
    return None
