"""Remote files as the reader of shards sees them: byte ranges, tried until they come, cached, fetched early.

A ``RemoteFolder`` reads through a ``Transport`` (one try), ``persist`` (many) and a ``RangeCache`` (none). The key of
a cached range holds the SHA-256 of the data set's manifest, so that a data set which was packed anew is another
one. All requests of a process run in fsspec's thread for network traffic, at most ``STREAMS`` of a folder at once.
Folders and files are values: they can be pickled and compared, and each process opens its own connections.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from vidit.data.limits import ShardError
from vidit.data.range_cache import RangeCache
from vidit.data.retries import persist
from vidit.data.transports import Transport, transport_of

STREAMS = 16
"""Requests that one process makes of one folder at a time: a latency of 50 ms then costs 3 ms a clip."""
MAX_EARLY_BYTES = 256 << 20
"""Most that is fetched before it is asked for."""
MAX_RANGE_BYTES = (1 << 30) + (8 << 20)
"""Largest range that is read, so that no index can ask for more memory than a video may have."""
Span = tuple[str, int, int]
"""A file's name, an offset and a size in bytes."""
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Reach:
    """How remote files are read: the options ``data.cache_dir cache_gib stall_s patience_s``."""

    cache_dir: str = ""
    cache_gib: float = 32.0
    stall_s: float = 30.0
    patience_s: float = 300.0


DIRECT = Reach()
"""The defaults: nothing is cached."""


@dataclass(frozen=True)
class RemoteFolder:
    """A folder behind a URL. ``manifest`` is the text of its ``dataset.json``; before it is known nothing is cached."""

    url: str
    reach: Reach = DIRECT
    manifest: str = field(default="", repr=False)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemoteFile:
        return RemoteFile(self, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFolder, (self.url, self.reach, self.manifest)

    @cached_property
    def version(self) -> str:
        """What tells this state of the data set from others: the manifest's SHA-256; empty before it is known."""
        return hashlib.sha256(self.manifest.encode()).hexdigest() if self.manifest else ""

    @cached_property
    def _transport(self) -> Transport:
        return transport_of(self.url)

    @cached_property
    def _cache(self) -> RangeCache | None:
        if not (self.reach.cache_dir and self.version):
            return None
        return RangeCache(Path(self.reach.cache_dir), int(self.reach.cache_gib * 2**30))

    @cached_property
    def _gate(self) -> asyncio.Semaphore:
        return asyncio.Semaphore(STREAMS)

    @cached_property
    def _early(self) -> dict[Span, Future[bytes]]:
        return {}

    def read(self, span: Span, fresh: bool = False) -> bytes:
        """Exactly the bytes of a span; ``fresh`` goes past the cache. ShardError, StorageError."""
        if not fresh and span in self._early:
            return self._early.pop(span).result()
        return self._run(self._read, span, fresh).result()

    def expect(self, spans: Iterable[Span]) -> None:
        """Begin to fetch what will be read next, and forget what was expected before and not read.

        A failure is kept for the read, which raises it: order and errors are those of reading one after another.
        """
        wanted: dict[Span, Future[bytes]] = {}
        room = MAX_EARLY_BYTES
        for span in dict.fromkeys(spans):
            room -= span[2]
            if room < 0:
                break
            wanted[span] = self._early.pop(span) if span in self._early else self._run(self._read, span, False)
        for forgotten in self._early.values():
            forgotten.cancel()
        self._early.clear()
        self._early.update(wanted)

    def size(self, name: str) -> int:
        """The bytes of a file. ShardError, StorageError."""
        return self._run(self._size, name).result()

    def _run(self, work: Callable[..., Coroutine[Any, Any, _T]], *arguments: Any) -> Future[_T]:
        from fsspec.asyn import get_loop  # here, since a run on local files needs none of this

        # Opened by the caller: some file systems log in, and wait, when they are made.
        _ = self._transport, self._cache
        return asyncio.run_coroutine_threadsafe(work(*arguments), get_loop())

    async def _read(self, span: Span, fresh: bool) -> bytes:
        name, offset, size = span
        what = f"{self.url}/{name}: bytes {offset} to {offset + size}"
        if size > MAX_RANGE_BYTES:
            raise ShardError(f"{what} exceed the limit of {MAX_RANGE_BYTES} bytes for one read; cut into shorter clips")

        async def fetched() -> bytes:
            got = bytearray()
            await persist(
                lambda stall_s: self._transport.fetch(name, offset, size, got, stall_s),
                what, self.reach.stall_s, self.reach.patience_s, lambda: len(got), size,
            )  # fmt: skip
            return bytes(got)

        return await self._kept(span, fetched, fresh) if size else b""

    async def _size(self, name: str) -> int:
        async def asked() -> bytes:
            size = await persist(
                lambda stall_s: self._transport.size(name, stall_s),
                f"{self.url}/{name}: its size", self.reach.stall_s, self.reach.patience_s,
            )  # fmt: skip
            return b"%d" % size

        return int(await self._kept((name, -1, 0), asked, fresh=False))

    async def _kept(self, span: Span, fetch: Callable[[], Coroutine[Any, Any, bytes]], fresh: bool) -> bytes:
        """What the cache holds for a span, else what is fetched, which it then holds."""
        cache = self._cache
        key = repr((self.url, self.version, *span))
        # Threads for the disk, so that the requests of others go on.
        if cache and not fresh and (held := await asyncio.to_thread(cache.get, key)) is not None:
            return held
        async with self._gate:
            content = await fetch()
        if cache:
            await asyncio.to_thread(cache.put, key, content)
        return content


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a remote folder, with what the readers of shards use of ``Path``."""

    parent: RemoteFolder
    name: str

    def __post_init__(self) -> None:
        assert re.fullmatch(r"[\w.-]+", self.name), f"{self.name!r} would lead out of {self.parent}"

    def __str__(self) -> str:
        return f"{self.parent}/{self.name}"

    def with_suffix(self, suffix: str) -> RemoteFile:
        return RemoteFile(self.parent, self.name.rpartition(".")[0] + suffix)

    def read_range(self, offset: int, size: int, fresh: bool = False) -> bytes:
        """Exactly ``size`` bytes from ``offset``; ``fresh`` goes past the cache. ShardError, StorageError."""
        return self.parent.read((self.name, offset, size), fresh)


class RemotePart:
    """A span of a remote file that is fetched whole, once, when the first range in it is read."""

    def __init__(self, file: RemoteFile, start: int, size: int) -> None:
        self.file, self.start, self.size = file, start, size
        self._content: bytes | None = None

    def __str__(self) -> str:
        return str(self.file)

    def read_range(self, offset: int, size: int, fresh: bool = False) -> bytes:
        """As ``RemoteFile.read_range``; a range that does not lie in the span is our own mistake."""
        first = offset - self.start
        assert 0 <= first <= first + size <= self.size, (offset, size, self.start, self.size)
        if fresh or self._content is None:
            self._content = self.file.read_range(self.start, self.size, fresh)
        return self._content[first : first + size]
