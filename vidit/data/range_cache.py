"""Byte ranges of remote files, kept on local disk within a limit; shared by all processes of one machine.

An entry is one file, named by the SHA-256 of its key: a header with the length and CRC-32 of the content, then the
content. It is written under another name and renamed, and compared with its header on every read, so that neither
a kill at any moment nor a bad disk gives out anything but what was put in. The entries that were read longest ago
are deleted first (their time of change is set by every read). What is held is counted in the lock file *before* an
entry is written: a process that dies in between leaves the count too high, and the next count over the limit is
corrected by looking. Only files with names of this module's making are deleted. The folder belongs on a local disk:
it is guarded by ``flock``.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import struct
import time
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_HEADER = struct.Struct("<4sIQ")
_MAGIC = b"VRC1"
_BLOCK = 4096
_COUNT_CHARS = 20
_ENTRY = re.compile(r"[0-9a-f]{64}\.range")
_PARTIAL = re.compile(r"[0-9a-f]{64}\.[0-9]+\.[0-9a-f]{8}\.partial")
_OLD_S = 3600.0
KEPT_WHEN_FULL = 0.9
"""Share of the limit that is left when it was reached, so that not every later entry looks at all of them."""


def on_disk(size: int) -> int:
    """The bytes that an entry of a content of ``size`` bytes takes."""
    return -(-(size + _HEADER.size) // _BLOCK) * _BLOCK


class RangeCache:
    """Key -> bytes, at most ``limit_bytes`` of them on disk. Never raises for what the disk does: it warns once."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """ValueError where ``folder`` cannot be made or written."""
        self.folder, self.limit_bytes = folder, limit_bytes
        self._warned = False
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked():
                pass
        except OSError as error:
            raise ValueError(
                f"data.cache_dir={folder} cannot be written ({error.strerror}); give a folder on a local disk"
            ) from error

    def get(self, key: str) -> bytes | None:
        """What was put under a key; None where nothing is, or what is there was damaged."""
        path = self._path(key)
        try:
            raw = path.read_bytes()
        except OSError:
            return None
        content = raw[_HEADER.size :]
        if raw[: _HEADER.size] != _header(content):
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        return content

    def put(self, key: str, content: bytes) -> None:
        """Keep a content; one that alone is over the limit is not kept."""
        if on_disk(len(content)) > self.limit_bytes:
            return
        path = self._path(key)
        partial = path.with_name(f"{path.stem}.{os.getpid()}.{os.urandom(4).hex()}.partial")
        try:
            self._reserve(on_disk(len(content)))
            path.parent.mkdir(mode=0o700, exist_ok=True)
            try:
                with partial.open("wb") as file:
                    file.write(_header(content))
                    file.write(content)
                partial.replace(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(f"data.cache_dir={self.folder} takes nothing more: {error}", stacklevel=2)

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.range"

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The lock file, open, while no other process or thread has it."""
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _reserve(self, size: int) -> None:
        with self._locked() as lock:
            count = os.pread(lock, _COUNT_CHARS, 0)
            held = int(count) if re.fullmatch(rb"[0-9]{20}", count) else None
            if held is None or held + size > self.limit_bytes:
                held = self._make_room(size)
            os.pwrite(lock, b"%020d" % (held + size), 0)

    def _make_room(self, size: int) -> int:
        """Delete until ``size`` more bytes fit well; what is held then, in bytes. Called with the lock."""
        entries = sorted(self._entries())
        held = sum(num_bytes for _, num_bytes, _ in entries)
        room = self.limit_bytes - size
        if held > room:
            room = min(room, int(self.limit_bytes * KEPT_WHEN_FULL))
        for _, num_bytes, path in entries:
            if held <= room:
                break
            path.unlink(missing_ok=True)
            held -= num_bytes
        return held

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of each entry; what a dead process left half written is deleted."""
        for folder in self.folder.glob("[0-9a-f][0-9a-f]"):
            for item in os.scandir(folder):
                with suppress(OSError):
                    status = item.stat(follow_symlinks=False)
                    if _ENTRY.fullmatch(item.name):
                        yield status.st_mtime_ns, on_disk(status.st_size - _HEADER.size), Path(item.path)
                    elif _PARTIAL.fullmatch(item.name) and status.st_mtime < time.time() - _OLD_S:
                        Path(item.path).unlink()


def _header(content: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, zlib.crc32(content), len(content))
