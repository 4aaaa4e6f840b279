"""``shard-000000.index.jsonl`` beside a tar: one row a clip, for people and for tools of others."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from vidit.data.clip_ref import CRCS, IN_INDEX, OPTIONAL
from vidit.data.columns import COUNTS, LEAST, MOST_BYTES, SUFFIXES, Columns, is_count, is_sha256
from vidit.data.manifest import index_path
from vidit.data.storage import File, read_text
from vidit.data.tar import CURE, ShardError


def read_rows_of(shard: File) -> Columns:
    """The rows beside a tar, each checked for what it may say; the tar is not looked at. ShardError, StorageError."""
    path = index_path(shard)
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ShardError(f"{path} cannot be read: {error}; delete it, or {CURE}") from error
    rows = [_parsed(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    if not rows:
        raise ShardError(f"{path} is empty, one clip or more was expected; delete it, or {CURE}")
    return Columns.of(rows)


_FIELDS = set(IN_INDEX)


def _parsed(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{place} is not JSON: {error}; delete the index, or {CURE}") from error
    if not isinstance(row, dict) or not _FIELDS - OPTIONAL <= set(row) <= _FIELDS:
        raise ShardError(f"{place} does not have the fields {' '.join(sorted(_FIELDS))}; {CURE}")
    wrong = [name for name, dtype in COUNTS.items() if not is_count(row[name], LEAST.get(name, 0), _most(dtype))]
    wrong += [name for name in sorted(CRCS & set(row)) if not is_count(row[name], 0, (1 << 32) - 1)]
    wrong += [] if is_rate(row["fps"]) else ["fps"]
    wrong += [] if isinstance(row["key"], str) and row["key"] else ["key"]
    wrong += [] if is_sha256(row.get("video_sha256", "0" * 64)) else ["video_sha256"]
    wrong += [name for name, allowed in SUFFIXES.items() if row[name] not in allowed]
    if wrong:
        raise ShardError(f"{place}: {wrong[0]}={row[wrong[0]]!r} cannot be; delete the index, or {CURE}")
    return row


def _most(dtype: type[np.int64] | type[np.int32]) -> int:
    return min(MOST_BYTES, int(np.iinfo(dtype).max))


def is_rate(value: object) -> bool:
    """Whether a value is a number of frames a second."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
