"""The files of a data set, wherever they lie: a local folder or a URL, read by byte range.

This is the one seam between the readers of shards and what they read from. A local file is a ``Path`` and read by
``pread`` and nothing else; a remote one retries, caches and checks lengths (``vidit/data/remote.py``).
"""

from __future__ import annotations

import os
from pathlib import Path

from vidit.data.limits import ShardError
from vidit.data.remote import Reach, RemoteFile, RemoteFolder, RemotePart
from vidit.data.transports import check_url

Folder = Path | RemoteFolder
File = Path | RemoteFile
Readable = Path | RemoteFile | RemotePart
MAX_TEXT_BYTES = 256 << 20
"""Largest index or manifest that is read from a remote folder."""


def is_remote(place: Path | str) -> bool:
    """Whether a place is given by a URL."""
    return isinstance(place, str) and "://" in place


def folder_of(place: Path | str, reach: Reach) -> Folder:
    """The folder that a user names. ValueError for a URL that is not opened."""
    if isinstance(place, str) and is_remote(place):
        check_url(place)
        return RemoteFolder(place.rstrip("/"), reach)
    return Path(place)


def read_range(file: Readable, offset: int, size: int, fresh: bool = False) -> bytes:
    """``size`` bytes from ``offset``, fewer only where a local file ends; ``fresh`` goes past a cache.

    OSError for a local file, ShardError and StorageError for a remote one.
    """
    if not isinstance(file, Path):
        return file.read_range(offset, size, fresh)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)


def size_of(file: File) -> int:
    """The bytes of a file. Errors as ``read_range``."""
    return file.stat().st_size if isinstance(file, Path) else file.parent.size(file.name)


def read_text(file: File) -> str:
    """A whole file of text. Errors as ``read_range``, and UnicodeDecodeError."""
    if isinstance(file, Path):
        return file.read_text(encoding="utf-8")
    size = size_of(file)
    if size > MAX_TEXT_BYTES:
        raise ShardError(f"{file} has {size} bytes, the limit is {MAX_TEXT_BYTES}; pack into smaller shards")
    return file.read_range(0, size).decode("utf-8")
