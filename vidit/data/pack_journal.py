"""What a packing has done so far, on disk: what decoding each file found out, and which shards are whole.

A file counts as known while its path, size, modification time and place in a tar are what they were; what a decoder
of another version found out counts for nothing. A line that a crash tore is read as if it were not there, and the
last line of a file or a shard is the one that holds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av

from vidit.data.candidates import Place, UnreadableError
from vidit.data.limits import ClipError
from vidit.data.shards import index_path
from vidit.data.video import VideoInfo, verify
from vidit.whole_file import read_rows

_VERSION = 1
"""Of the journal, and of what ``verify`` finds out: to be raised with either."""


@dataclass(frozen=True, slots=True)
class Examined:
    """What one video is: a function of its bytes alone. ``info`` is None where it cannot be used, for ``reason``."""

    num_bytes: int
    sha256: str
    info: VideoInfo | None
    reason: str = ""
    is_lasting: bool = True
    """Whether another try would find the same; not so for a file that could not be read."""


def examine(place: Place) -> Examined:
    """Read and decode a whole video once."""
    video = b""
    try:
        video = place.read()
        return Examined(len(video), hashlib.sha256(video).hexdigest(), verify(video))
    except ClipError as error:
        digest = hashlib.sha256(video).hexdigest()
        return Examined(len(video), digest, None, str(error), is_lasting=not isinstance(error, UnreadableError))


def unexamined(place: Place) -> Examined:
    """Of a video on which the decoder ends its process, each time."""
    reason = "decoding it ended the process, twice: the decoder crashed, or had too little memory"
    return Examined(place.size, "", None, reason, is_lasting=False)


class Journal:
    """Reads what is there, then appends; a context manager. Raises OSError where the file cannot be written."""

    def __init__(self, path: Path) -> None:
        self._known: dict[str, tuple[list[int], Examined]] = {}
        self._shards: dict[str, tuple[str, dict[str, Any]]] = {}
        header = {"version": _VERSION, "decoder": f"av {av.__version__}, {av.library_versions}"}
        rows = [row for row in read_rows(path) if isinstance(row, dict)]
        is_ours = bool(rows) and rows[0] == header
        for row in rows[1:] if is_ours else ():
            self._take(row)
        self._file = path.open("ab" if is_ours else "wb")
        # A torn last line is ended, so that it does not swallow the next one.
        self._file.write(b"\n")
        if not is_ours:
            self._append(header)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def known(self, place: Place) -> Examined | None:
        """What is known of a file as it is now."""
        state, examined = self._known.get(_id_of(place), ([], None))
        return examined if state == _state_of(place) else None

    def note(self, place: Place, examined: Examined) -> None:
        """Keep what was found out; of a file that could not be read nothing is kept."""
        if examined.is_lasting:
            self._append({"file": _id_of(place), "state": _state_of(place), **asdict(examined)})

    def forget(self, place: Place) -> None:
        """Drop what is known of a file that changed and kept its size and time."""
        self._append({"file": _id_of(place), "state": []})

    def finished(self, shard: Path, recipe: str) -> dict[str, Any] | None:
        """The manifest's row of a shard that was made by this recipe and is there with its index, else None."""
        made_by, row = self._shards.get(shard.name, ("", {}))
        if made_by != recipe or not shard.is_file() or not index_path(shard).is_file():
            return None
        return row if shard.stat().st_size == row["num_bytes"] else None

    def begin_shard(self, name: str) -> None:
        """From here on a shard of this name is not whole."""
        self._append({"shard": name, "row": None})

    def end_shard(self, recipe: str, row: dict[str, Any]) -> None:
        """A shard is whole and under its name, its index too."""
        self._append({"shard": row["name"], "recipe": recipe, "row": row}, durable=True)

    def _append(self, row: dict[str, Any], durable: bool = False) -> None:
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        if durable:
            os.fsync(self._file.fileno())

    def _take(self, row: dict[str, Any]) -> None:
        """One line; a line that is not as this class writes it is passed over, which costs a second look at a file."""
        try:
            if "file" in row:
                if row["state"]:
                    info = VideoInfo(**row["info"]) if row["info"] else None
                    examined = Examined(row["num_bytes"], row["sha256"], info, row["reason"])
                    self._known[row["file"]] = row["state"], examined
                else:
                    self._known.pop(row["file"], None)
            else:
                self._shards[row["shard"]] = (row["recipe"], row["row"]) if row["row"] else ("", {})
        except (KeyError, TypeError):
            return


def recipe_of(name: str, parts: Iterable[tuple[str, str, str, bytes]]) -> str:
    """A hash of what makes a shard: its name, and of each clip the key, suffix, SHA-256 of the video, and sidecar."""
    digest = hashlib.sha256(f"{_VERSION} {name}".encode())
    for key, suffix, sha256, sidecar in parts:
        digest.update(f"\n{key} {suffix} {sha256} {len(sidecar)} ".encode() + sidecar)
    return digest.hexdigest()


def _id_of(place: Place) -> str:
    path = str(place.path.absolute())
    return f"{path}#{place.member.offset}" if place.member else path


def _state_of(place: Place) -> list[int]:
    return [place.size, place.mtime_ns, place.member.size if place.member else -1]
