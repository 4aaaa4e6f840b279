"""One file read from front to back, local or remote.

A remote file comes in large ranges, in order, a few of them asked for before they are needed; all that a
``RemoteFolder`` does for a range (retries, patience, time-outs) is done for each of these. What is skipped over by a
``seek`` is not fetched. Memory is bounded by ``CHUNK_BYTES`` times what is kept and asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vidit.data.limits import ShardError, StorageError
from vidit.data.remote import RemoteFile
from vidit.data.storage import File, size_of
from vidit.data.tar import LARGEST_STEP_BACK, Sequential

CHUNK_BYTES = 8 << 20
"""Of one request: long enough that its latency does not count."""
AHEAD = 2
"""Chunks that are asked for beyond the one that is read."""


@contextmanager
def opened(file: File) -> Iterator[tuple[Sequential, int]]:
    """(the open file, its bytes). ShardError for what is no file, StorageError where the disk or the network fails."""
    if isinstance(file, RemoteFile):
        num_bytes = size_of(file)
        yield RemoteSequence(file, num_bytes), num_bytes
        return
    if not file.is_file():
        raise ShardError(f"{file} is not a file; correct data.train, or put it back")
    try:
        with Path(file).open("rb") as local:
            yield local, file.stat().st_size
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {error.strerror or error}; check the disk") from error


class RemoteSequence:
    """A remote file of ``num_bytes`` as ``tar.members_of`` reads it: forward, and back by a step."""

    def __init__(self, file: RemoteFile, num_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        assert chunk_bytes >= LARGEST_STEP_BACK
        self.file, self.num_bytes, self.chunk_bytes = file, num_bytes, chunk_bytes
        self._at = 0
        self._kept: dict[int, bytes] = {}

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, /) -> int:
        self._at = offset
        return offset

    def read(self, size: int, /) -> bytes:
        """So many bytes, fewer only at the file's end. ShardError, StorageError; ValueError for a step too far back."""
        end = min(self._at + size, self.num_bytes)
        if end <= self._at:
            return b""
        first, last = self._at // self.chunk_bytes, (end - 1) // self.chunk_bytes
        pieces = []
        for number in range(first, last + 1):
            start = number * self.chunk_bytes
            pieces.append(self._chunk(number)[max(0, self._at - start) : end - start])
        self._at = end
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _chunk(self, number: int) -> bytes:
        if number not in self._kept:
            if self._kept and number < max(self._kept):
                raise ValueError(f"byte {number * self.chunk_bytes} was passed and is not kept")
            folder = self.file.parent
            spans = [
                self._span(at) for at in range(number, number + 1 + AHEAD) if at * self.chunk_bytes < self.num_bytes
            ]
            folder.expect(spans)
            # The one before stays, for the step back.
            self._kept = {at: content for at, content in self._kept.items() if at == number - 1}
            self._kept[number] = folder.read(spans[0])
        return self._kept[number]

    def _span(self, number: int) -> tuple[str, int, int]:
        start = number * self.chunk_bytes
        return self.file.name, start, min(self.chunk_bytes, self.num_bytes - start)
