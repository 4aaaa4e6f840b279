"""A video that may become a clip: where its bytes lie, what was found beside it, and the key that it gets.

Contract: keys differ, and depend on the names of all candidates alone, not on the order in which they were found.
"""

from __future__ import annotations

import hashlib
import math
import re
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from vidit.data.limits import ClipError
from vidit.data.tar import Limits, Member, ShardError, read

_MAX_KEY_CHARS = 80


class UnreadableError(ClipError):
    """A file that the system does not give out now, and may give out at another time."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of a video lie: a file, or a member of a tar. ``size`` in bytes and ``mtime_ns`` are the file's,
    as it was found: while both stay, its content counts as unchanged.
    """

    path: Path
    size: int
    mtime_ns: int
    member: Member | None = None

    def read(self) -> bytes:
        """The whole video. ClipError where it is too large or its tar is damaged, UnreadableError from the system."""
        limit = Limits().max_video_bytes
        try:
            if self.member:
                return read(self.path, self.member)
            num_bytes = self.path.stat().st_size
            if num_bytes > limit:
                raise ClipError(f"{num_bytes} bytes, the limit is {limit}; cut the file into clips first")
            return self.path.read_bytes()
        except OSError as error:
            raise UnreadableError(f"cannot be read: {error.strerror}") from error
        except ShardError as error:
            raise ClipError(str(error)) from error


@dataclass(frozen=True, slots=True)
class Candidate:
    """One video with what belongs to it. ``name`` is what a report calls it, ``key`` its name in a shard."""

    place: Place
    name: str
    key: str
    caption: bytes | str | None
    """As found; None where there is none."""
    origin: dict[str, Any]
    """What else was found beside it, as JSON can hold it."""

    @property
    def suffix(self) -> str:
        return self.name.rpartition(".")[2].lower()


@dataclass(frozen=True, slots=True)
class Found:
    """What a source holds: candidates by ascending key, (name, reason) of what cannot be one, captions of no file."""

    candidates: tuple[Candidate, ...]
    rejected: tuple[tuple[str, str], ...] = ()
    captions_without_file: tuple[str, ...] = ()


def place_of(path: Path) -> Place | None:
    """A regular file as it is now; None where there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: a name with a NUL
        return None
    return Place(path, status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def with_keys(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The same with a key from each name, sorted by key."""
    plain = Counter(_plain_key(item.name) for item in candidates)
    keyed = []
    for item in candidates:
        key = _plain_key(item.name)
        # A key that had to be changed, or that two names share, is told apart by a hash of the name.
        if plain[key] > 1 or key != _stem(item.name):
            key = f"{key}-{hashlib.sha256(item.name.encode()).hexdigest()[:8]}"
        keyed.append(replace(item, key=key))
    return tuple(sorted(keyed, key=lambda item: item.key))


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def _plain_key(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", _stem(name)).lstrip("_-")[:_MAX_KEY_CHARS] or "clip"


def plain_text(text: str) -> str:
    """Text that UTF-8 can hold: a byte of a file name that is no UTF-8, and half a character, become ``\\udc..``."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def plain_value(value: object) -> Any:
    """A value from a table or a sidecar as JSON can hold it: no NaN, no date, no bytes, no broken text."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {plain_text(str(name)): plain_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    return value.hex() if isinstance(value, bytes) else plain_text(str(value))
