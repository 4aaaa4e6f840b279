"""The videos of a folder and the captions that belong to them, from a list or from a file beside each."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidit.data.tar import VIDEO_SUFFIXES, Limits

_MAX_KEY_CHARS = 80


@dataclass(frozen=True, slots=True)
class Source:
    """One video file and the caption that was found for it."""

    path: Path
    name: str
    key: str
    caption: bytes | str | None
    origin: dict[str, Any]


def caption_rows(source: Path, captions: Path | None) -> dict[str, dict[str, Any]]:
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


def find_sources(source: Path, rows: dict[str, dict[str, Any]]) -> list[Source]:
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
        found.append(Source(path, name.as_posix(), key, *_caption_of(path, rows.get(name.as_posix()))))
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
