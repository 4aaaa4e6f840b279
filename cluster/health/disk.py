"""Folders that a run reads and writes: they take a file, give it back as it was, are quick enough and have room."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cluster.health.asked import Asked
from cluster.health.finding import Finding, UnfitError, at_least, equal

PIECE, PIECES = 4 << 20, 8


def disk(asked: Asked) -> Iterator[Finding]:
    """Free space, then 32 MiB written with fsync and read again past the page cache where the system lets it go."""
    for folder in asked.folders or (Path(tempfile.gettempdir()),):
        if not folder.is_dir():
            raise UnfitError(f"folder {folder} does not exist, must be a folder; mount it, or give another --folder")
        free = shutil.disk_usage(folder).free / 2**30
        yield at_least(f"{folder} free GiB", free, asked.free_gib, "delete old checkpoints, or use another file system")
        yield from _write_and_read(folder, asked)


def _write_and_read(folder: Path, asked: Asked) -> Iterator[Finding]:
    piece = os.urandom(PIECE)
    slow = "look at who else uses the file system; give another --folder"
    mib = PIECE * PIECES / 2**20
    try:
        # Its name is gone at once, so nothing is left behind however this ends.
        with tempfile.TemporaryFile(dir=folder, prefix=".health-", buffering=0) as file:
            start = time.perf_counter()
            for _ in range(PIECES):
                _write(file.fileno(), piece)
            os.fsync(file.fileno())
            written = mib / (time.perf_counter() - start)
            with suppress(OSError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            start = time.perf_counter()
            wrong = sum(file.read(PIECE) != piece for _ in range(PIECES))
            read = mib / (time.perf_counter() - start)
    except OSError as error:
        raise UnfitError(
            f"folder {folder} takes no file: {error.strerror}; check its rights, its quota and its mount"
        ) from error
    yield equal(f"{folder} wrong pieces of {PIECES}", wrong, 0, "do not use this file system")
    yield at_least(f"{folder} written MiB/s", written, asked.disk_mib_s, slow)
    yield at_least(f"{folder} read MiB/s", read, asked.disk_mib_s, slow)


def _write(descriptor: int, piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        view = view[os.write(descriptor, view) :]
