"""Where videos to pack come from: a folder, a table, or tars; the one place that tells them apart."""

from __future__ import annotations

from pathlib import Path

from vidit.data.candidates import Found
from vidit.data.caption_table import TABLES, Columns, read_table
from vidit.data.source_folder import files_below, find_in_folder
from vidit.data.source_table import find_in_table
from vidit.data.source_tars import find_in_tars
from vidit.data.tar import VIDEO_SUFFIXES


def find(source: Path, captions: Path | None = None, columns: Columns | None = None) -> Found:
    """Every video of ``source`` with what belongs to it.

    ``source`` is a folder of videos, whose captions stand in ``captions`` (default: its ``clips.jsonl``) or beside
    each video; a table of files and captions; a tar, or a folder of them. Raises ValueError for what is none of
    these, for a malformed table, and for a choice of columns or captions that the source has no use for.
    """
    columns = columns or Columns()
    if source.is_dir():
        tars = files_below(source, frozenset({"tar"}))
        if not tars:
            return _find_with_captions(source, captions, columns)
        if files_below(source, VIDEO_SUFFIXES):
            raise ValueError(f"{source} holds both tars and videos; pack them one after the other, from two folders")
        _refuse(source, captions=captions, file_column=columns.file)
        return find_in_tars(source, tars, columns)
    if source.suffix.lower() == ".tar" and source.is_file():
        _refuse(source, captions=captions, file_column=columns.file)
        return find_in_tars(source.parent, [source], columns)
    if source.suffix.lower() in TABLES and source.is_file():
        _refuse(source, captions=captions)
        return find_in_table(source, columns)
    raise ValueError(f"{source} is not a folder, nor a file that ends in one of {' '.join(TABLES)} .tar")


def _find_with_captions(folder: Path, captions: Path | None, columns: Columns) -> Found:
    path = captions or folder / "clips.jsonl"
    if captions or path.is_file():
        return find_in_folder(folder, read_table(path, columns), columns)
    _refuse(folder, file_column=columns.file)
    return find_in_folder(folder, {}, columns)


def _refuse(source: Path, **options: object) -> None:
    for name, value in options.items():
        if value is not None:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {value} has no effect: captions of {source} do not come from such a table")
