"""A folder beside the final one, which a data set is written to and moved from when it is whole."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vidit.data.manifest import MANIFEST, is_ours, sha256_of
from vidit.data.pack_report import REPORT


@dataclass(frozen=True, slots=True)
class Stage:
    """A folder beside ``out`` that takes its place when it is whole."""

    folder: Path
    out: Path
    overwrite: bool

    def publish(self) -> bool:
        """Move everything into place; True if ``out`` had the same shards and keeps them."""
        old, new = self.out / MANIFEST, self.folder / MANIFEST
        held = [path for path in self.out.iterdir() if _may_be_here(path.name)]
        if old.is_file() and old.read_bytes() == new.read_bytes() and self._same_shards():
            if (self.folder / REPORT).exists():
                (self.folder / REPORT).replace(self.out / REPORT)
            return True
        if held and not self.overwrite:
            raise ValueError(f"{self.out} holds another data set; write elsewhere, or overwrite it on purpose")
        for path in sorted(held, key=lambda path: path.name != MANIFEST):
            path.unlink()
        # The manifest goes first and comes last, so that a half-moved folder never looks whole.
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == MANIFEST):
            path.replace(self.out / path.name)
        return False

    def _same_shards(self) -> bool:
        return all(
            (self.out / path.name).is_file() and sha256_of(self.out / path.name) == sha256_of(path)
            for path in self.folder.iterdir()
            if path.name != REPORT
        )


@contextmanager
def staged(out: Path, overwrite: bool) -> Iterator[Stage]:
    out.mkdir(parents=True, exist_ok=True)
    foreign = sorted(path.name for path in out.iterdir() if not _may_be_here(path.name))
    if foreign:
        raise ValueError(f"{out} holds {foreign[0]}, which is no part of a data set; write to an empty folder")
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield Stage(folder, out, overwrite)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not any(out.iterdir()):
            out.rmdir()


def _may_be_here(name: str) -> bool:
    return is_ours(name) or name == REPORT
