"""The clips of a data set as columns: what the rows of its index say, in 120 bytes a clip beside the key.

Columns come from rows, or from a file that is mapped into memory, so that only what is looked at is read. They are
checked as rows are: no value that a row could not have gets in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidit.data.tar import CAPTION_SUFFIXES, CURE, VIDEO_SUFFIXES, ShardError
from vidit.data.texts import Texts

COUNTS: dict[str, type[np.int64] | type[np.int32]] = {
    "video_offset": np.int64, "video_size": np.int64, "json_offset": np.int64, "json_size": np.int64,
    "num_frames": np.int32, "width": np.int32, "height": np.int32, "caption_chars": np.int32,
}  # fmt: skip
LEAST = {"video_offset": 512, "json_offset": 512, "num_frames": 1, "width": 1, "height": 1}
"""The least that a count may be; 0 where nothing stands here."""
MOST_BYTES = 1 << 60
"""Largest offset and size: a sum of two, filled up to a block, is a number of 64 bits."""
NO_CRC = -1
CRCS = ("video_crc32", "json_crc32")
SUFFIXES = {"video_suffix": VIDEO_SUFFIXES, "caption_suffix": CAPTION_SUFFIXES}
DTYPES: dict[str, type[np.generic]] = {
    **COUNTS,
    "fps": np.float64,
    **dict.fromkeys(CRCS, np.int64),
    **dict.fromkeys(SUFFIXES, np.uint8),
    "video_sha256": np.uint8,
}
"""Every column but the key. A CRC that is not known is -1, a SHA-256 zeros; a suffix is a number in a list of them."""


@dataclass(frozen=True, eq=False)
class Columns:
    """One entry a clip in each of ``arrays``, named as in ``DTYPES``; ``video_sha256`` has 32 bytes a clip.

    ``suffixes`` are the texts that ``video_suffix`` and ``caption_suffix`` number.
    """

    keys: Texts
    arrays: Mapping[str, NDArray[Any]]
    suffixes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Columns:
        """From rows that are checked, fields as in ClipRef."""
        suffixes = tuple(sorted({row[name] for row in rows for name in SUFFIXES}))
        codes = {suffix: code for code, suffix in enumerate(suffixes)}
        values: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in (*COUNTS, "fps")}
        values |= {name: [NO_CRC if row.get(name) is None else row[name] for row in rows] for name in CRCS}
        values |= {name: [codes[row[name]] for row in rows] for name in SUFFIXES}
        arrays = {name: np.array(column, DTYPES[name]) for name, column in values.items()}
        hashes = b"".join(bytes.fromhex(row.get("video_sha256") or "0" * 64) for row in rows)
        arrays["video_sha256"] = np.frombuffer(hashes, np.uint8).reshape(-1, 32)
        return cls(Texts.of([row["key"] for row in rows]), arrays, suffixes)

    @classmethod
    def joined(cls, parts: Sequence[Columns]) -> Columns:
        """One after another."""
        suffixes = tuple(sorted({suffix for part in parts for suffix in part.suffixes}))
        arrays: dict[str, NDArray[Any]] = {
            name: np.concatenate([part.arrays[name] for part in parts]) for name in DTYPES if name not in SUFFIXES
        }
        places = [np.array([suffixes.index(suffix) for suffix in part.suffixes], np.uint8) for part in parts]
        for name in SUFFIXES:
            codes = [place[part.arrays[name]] for place, part in zip(places, parts, strict=True)]
            arrays[name] = np.concatenate(codes)
        return cls(Texts.joined([part.keys for part in parts]), arrays, suffixes)

    def row(self, number: int) -> dict[str, Any]:
        """The fields of a ClipRef that an index holds."""
        row: dict[str, Any] = {name: self.arrays[name][number].item() for name in (*COUNTS, "fps", *CRCS)}
        row |= {name: None for name in CRCS if row[name] == NO_CRC}
        row |= {name: self.suffixes[self.arrays[name][number]] for name in SUFFIXES}
        sha256 = self.arrays["video_sha256"][number]
        return {**row, "key": self.keys[number], "video_sha256": sha256.tobytes().hex() if sha256.any() else None}

    def check(self, path: Path) -> None:
        """Hold every value against what a row may say. ShardError, with the clip's number, for one that cannot be."""
        for name, wrong in self._wrong().items():
            if wrong.any():
                number = int(np.argmax(wrong))
                value = self.arrays[name][number].item()
                raise ShardError(f"{path}, clip {number}: {name}={value!r} cannot be; {CURE}")
        if (number_ := self.keys.fault()) is not None:
            raise ShardError(f"{path}, clip {number_}: its key is empty or no text; {CURE}")

    def _wrong(self) -> dict[str, NDArray[np.bool_]]:
        wrong: dict[str, NDArray[np.bool_]] = {}
        for name in COUNTS:
            column = self.arrays[name]
            wrong[name] = (column < LEAST.get(name, 0)) | (column > MOST_BYTES)
        wrong["fps"] = ~(np.isfinite(self.arrays["fps"]) & (self.arrays["fps"] > 0))
        for name in CRCS:
            wrong[name] = (self.arrays[name] < NO_CRC) | (self.arrays[name] >= 1 << 32)
        for name, allowed in SUFFIXES.items():
            known = np.array([suffix in allowed for suffix in self.suffixes] + [False] * (256 - len(self.suffixes)))
            wrong[name] = ~known[self.arrays[name]]
        return wrong

    @cached_property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values()) + self.keys.content.nbytes + self.keys.ends.nbytes


def is_count(value: object, least: int, most: int = MOST_BYTES) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_sha256(value: object) -> bool:
    return isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))
