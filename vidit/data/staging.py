"""A folder beside the final one, which a data set is written to and moved from when it is whole.

Its name is fixed, so that what a killed process left is found by the next one, which goes on from there or removes
it; a lock in it keeps two processes that write the same data set apart.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from vidit.data.manifest import MANIFEST, is_ours, sha256_of
from vidit.data.pack_report import REPORT
from vidit.whole_file import full_disk_explained

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stage:
    """A folder beside ``out`` whose content goes there when it is whole."""

    folder: Path
    out: Path
    overwrite: bool

    @property
    def journal(self) -> Path:
        """A file for what a later process needs to know to go on."""
        return self.folder.parent / "journal.jsonl"

    def publish(self) -> bool:
        """Move everything into place; True if ``out`` had the same shards and keeps them."""
        self.out.mkdir(parents=True, exist_ok=True)
        old, new = self.out / MANIFEST, self.folder / MANIFEST
        held = [path for path in self.out.iterdir() if _may_be_here(path.name)]
        if old.is_file() and old.read_bytes() == new.read_bytes() and self._same_shards():
            if (self.folder / REPORT).exists():
                (self.folder / REPORT).replace(self.out / REPORT)
            return True
        if held and not self.overwrite and not self._is_half_moved(held):
            raise ValueError(f"{self.out} holds another data set; write elsewhere, or overwrite it on purpose")
        # The new manifest comes first: until every shard that it names is there, readers refuse the folder.
        new.replace(old)
        for path in held:
            if path.name != MANIFEST:
                path.unlink()
        for path in self.folder.iterdir():
            path.replace(self.out / path.name)
        return False

    def discard(self) -> None:
        """Keep nothing for a later process."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.journal.unlink(missing_ok=True)

    def _same_shards(self) -> bool:
        return all(self._is_same(path.name) for path in self.folder.iterdir() if path.name != REPORT)

    def _is_half_moved(self, held: list[Path]) -> bool:
        """Whether ``out`` holds this data set less what a process that died had not moved yet."""
        return (self.out / MANIFEST) in held and all(self._is_same(path.name) for path in held if path.name != REPORT)

    def _is_same(self, name: str) -> bool:
        there, here = self.out / name, self.folder / name
        return there.is_file() and here.is_file() and sha256_of(there) == sha256_of(here)


@contextmanager
def staged(out: Path, overwrite: bool, resume: bool = False, leave_on_sigterm: bool = True) -> Iterator[Stage]:
    """A Stage for ``out``, removed at the end; a SIGTERM in between ends the process by way of that removal, unless
    the caller answers it himself.

    With ``resume`` it holds what an earlier process left, and is removed when all went well; else it stays, unless
    it was discarded.
    Raises ValueError for an ``out`` with other content, RuntimeError while another process writes it.
    """
    foreign = sorted(path.name for path in out.iterdir() if not _may_be_here(path.name)) if out.exists() else []
    if foreign:
        raise ValueError(f"{out} holds {foreign[0]}, which is no part of a data set; write to an empty folder")
    final = out.resolve()
    root = final.parent / f".{final.name}.partial"
    answer = _leaving_on_sigterm() if leave_on_sigterm else nullcontext()
    with answer, full_disk_explained(out), _locked(root, out):
        stage = Stage(root / "data", out, overwrite)
        if not resume:
            stage.discard()
        stage.folder.mkdir(exist_ok=True)
        for path in stage.folder.iterdir():
            if path.name.startswith(".") or path.name in (MANIFEST, REPORT):
                path.unlink()
        try:
            yield stage
        except BaseException:
            if not resume:
                stage.discard()
            elif stage.journal.exists():
                log.warning("%s keeps what was done; the same command goes on from there, or delete it", root)
            raise
        stage.discard()


@contextmanager
def _locked(root: Path, out: Path) -> Iterator[None]:
    """Hold the lock in ``root``, which is made for it and removed with it."""
    path = root / "lock"
    with _lock(path, out):
        try:
            yield
        finally:
            path.unlink()
            with suppress(OSError):  # another process has made its lock already
                root.rmdir()


def _lock(path: Path, out: Path) -> BinaryIO:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whoever holds the lock may remove it between any two lines here: a lock on a removed file keeps nobody out.
        with suppress(FileNotFoundError):
            file = path.open("wb")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
            except BlockingIOError:
                file.close()
                raise RuntimeError(
                    f"another process is writing {out} (it holds {path}); wait for it, or write elsewhere"
                ) from None
            file.close()


@contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """Python dies of a SIGTERM without a `finally`; a thread that is not the main one cannot change that."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _may_be_here(name: str) -> bool:
    return is_ours(name) or name == REPORT
