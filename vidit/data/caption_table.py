"""A table of files and captions: CSV or TSV with a header, JSON lines, or Parquet, whose columns can be chosen.

Contract: a malformed table is refused as a whole, with the line, before any video is read: a line that is left out
in silence is a clip that nobody misses.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vidit.data.candidates import plain_text, plain_value

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


@dataclass(frozen=True, slots=True)
class Columns:
    """The names of the columns that matter; None where the user named none."""

    file: str | None = None
    caption: str | None = None

    @property
    def file_name(self) -> str:
        return self.file or "file"

    @property
    def caption_name(self) -> str:
        return self.caption or "caption"


@dataclass(frozen=True, slots=True)
class Row:
    """What a table says of one file: its caption as found, and all other columns."""

    caption: bytes | str | None
    origin: dict[str, Any]


def read_table(path: Path, columns: Columns) -> dict[str, Row]:
    """File name, as the table has it, -> Row. ValueError for what is no such table, and for a file listed twice."""
    if path.suffix.lower() not in TABLES:
        raise ValueError(f"{path} is not a table; give a file that ends in one of {' '.join(TABLES)}")
    if not path.is_file():
        raise ValueError(f"{path} is not a file; name a table of files and captions")
    rows: dict[str, Row] = {}
    has_caption = False
    for place, cells in _rows(path):
        file = cells.get(columns.file_name)
        if not isinstance(file, str) or not file.strip():
            raise ValueError(
                f"{path}, {place} has no `{columns.file_name}`; give each line a file and a caption, or name the "
                f"column with --file-column (there: {' '.join(map(str, cells))[:200] or 'none'})"
            )
        name = plain_text(PurePosixPath(file).as_posix())
        if name in rows:
            raise ValueError(f"{path}, {place}: {name} was captioned before; give one line a file")
        has_caption |= columns.caption_name in cells
        rows[name] = row_of_cells(cells, columns)
    if columns.caption and not has_caption:
        raise ValueError(f"{path} has no column `{columns.caption}`, which --caption-column names")
    return rows


def row_of_cells(cells: dict[str, Any], columns: Columns) -> Row:
    """The caption, and the other cells as JSON can hold them."""
    caption = cells.get(columns.caption_name)
    others = {name: value for name, value in cells.items() if name not in (columns.caption_name, columns.file_name)}
    return Row(caption if isinstance(caption, str | bytes) else None, plain_value(others))


def row_beside(sidecar: bytes | None, text: bytes | None, columns: Columns) -> Row:
    """What a .json and a .txt beside a video say: caption of the first, else the second; the first's other fields.

    One that is no JSON, or has no caption, leaves the word to the other.
    """
    row = Row(None, {})
    try:
        cells = json.loads((sidecar or b"{}").decode("utf-8-sig", "replace"))
        row = row_of_cells(cells, columns) if isinstance(cells, dict) else row
    except (ValueError, RecursionError):
        pass  # a clip with neither is rejected for its caption
    return (
        row
        if row.caption is not None and row.caption.strip()
        else Row(row.caption if text is None else text, row.origin)
    )


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, cells) of each line."""
    readers = {".jsonl": _json_rows, ".parquet": _parquet_rows}
    return readers.get(path.suffix.lower(), _csv_rows)(path)


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig", "replace"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} is not an object of the form {{...}}")
            yield f"line {number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            if doubled := sorted({name for name in header if header.count(name) > 1}):
                raise ValueError(f"{path} has {header.count(doubled[0])} columns named {doubled[0]!r}; rename one")
            if len(header) == 1 and ";" in header[0]:
                raise ValueError(f"{path} is separated by semicolons; write commas, or tabs in a .tsv")
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise ValueError(
                        f"{path}, line {reader.line_num} has {len(cells)} cells, its header has {len(header)}; "
                        "put a cell that holds a comma or a quote into quotes"
                    )
                yield f"line {reader.line_num}", dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num} is not CSV: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise RuntimeError(f'{path} needs pyarrow, which is the extra parquet: pip install -e ".[parquet]"') from error
    try:
        with parquet.ParquetFile(path) as file:
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(batch_size=4096))
            for number, cells in enumerate(rows, start=1):
                yield f"row {number}", cells
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a Parquet file that can be read: {error}") from error
