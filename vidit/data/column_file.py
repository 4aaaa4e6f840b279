"""``index.safetensors``: the columns of a data set in one file, mapped into memory.

The manifest holds its size and SHA-256, and it is compared with both, and its values with what rows may say, before a
clip of it is used: a gigabyte a second, where rows take seconds a million. safetensors gives named columns in a file
that is checked for overlaps and ends when it is opened, is read by tools of others, and holds no code. A remote file is
fetched whole, through the cache, into a temporary file. A process that is handed the columns maps the same file anew.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vidit.data.columns import DTYPES, Columns
from vidit.data.limits import ShardError
from vidit.data.manifest import Listed, sha256_of
from vidit.data.remote import RemoteFile
from vidit.data.storage import File
from vidit.data.tar import CURE
from vidit.data.texts import Texts
from vidit.whole_file import write_whole

FORMAT, VERSION = "vidit-columns", "1"
PIECE = 16 << 20
"""Bytes of a remote file that are asked for at a time."""
STREAMS = 4
KEY_BYTES, KEY_ENDS = "key", "key_end"
State = tuple[int, int, int]
"""Size, time of change and number of a file: what tells that it is the one that was checked."""


@dataclass(frozen=True, eq=False)
class MappedColumns(Columns):
    """Columns that lie in a file."""

    path: Path
    state: State
    keeper: Any = None
    """A temporary file, which is there as long as this is."""

    def anew(self) -> MappedColumns:
        """Mapped anew: what was looked at so far no longer counts as memory of this process."""
        return replace(_again(self.path, self.state), keeper=self.keeper)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.path, self.state)


def write_columns(path: Path, columns: Columns) -> Listed:
    """Write the file, the same bytes for the same columns; returns its line of the manifest."""
    arrays = {name: np.ascontiguousarray(array) for name, array in columns.arrays.items()}
    arrays |= {KEY_BYTES: columns.keys.content, KEY_ENDS: columns.keys.ends}
    metadata = {"about": json.dumps({"format": FORMAT, "version": VERSION, "suffixes": columns.suffixes})}
    content = save(arrays, metadata)
    write_whole(path, content)
    return Listed(path.name, len(content), hashlib.sha256(content).hexdigest())


def open_columns(file: File, listed: Listed, num_clips: int) -> Columns:
    """The columns of a data set of ``num_clips``, checked. ShardError; StorageError for one behind a URL."""
    path, keeper = (file, None) if isinstance(file, Path) else _fetched(file, listed)
    if not path.is_file():
        raise ShardError(f"{file} is missing, which its dataset.json lists; {CURE}")
    if (found := path.stat().st_size) != listed.num_bytes:
        raise ShardError(f"{file}: {found} bytes, dataset.json says {listed.num_bytes}; {CURE}")
    if keeper is None and (sha256 := sha256_of(path)) != listed.sha256:
        raise ShardError(f"{file}: SHA-256 {sha256}, dataset.json says {listed.sha256}; {CURE}")
    columns = _mapped(path, keeper)
    if len(columns) != num_clips:
        raise ShardError(f"{file}: {len(columns)} clips, dataset.json says {num_clips}; {CURE}")
    columns.check(path)
    return columns


def _fetched(file: RemoteFile, listed: Listed) -> tuple[Path, Any]:
    """A copy on local disk. What differs is fetched once more, past the cache: it may be damaged on the way."""
    for fresh in (False, True):
        keeper = tempfile.NamedTemporaryFile(prefix="vidit-index-", suffix=".safetensors")  # noqa: SIM115
        if (sha256 := _copied(file, listed, keeper, fresh)) == listed.sha256:
            return Path(keeper.name), keeper
        keeper.close()
    raise ShardError(f"{file}: SHA-256 {sha256}, dataset.json says {listed.sha256}; {CURE}")


def _copied(file: RemoteFile, listed: Listed, to: Any, fresh: bool) -> str:
    digest = hashlib.sha256()
    spans = [(start, min(PIECE, listed.num_bytes - start)) for start in range(0, listed.num_bytes, PIECE)]
    with ThreadPoolExecutor(STREAMS) as pool:
        for first in range(0, len(spans), STREAMS):  # a few pieces at a time, not the whole file in memory
            for piece in pool.map(
                lambda span: file.read_range(span[0], span[1], fresh), spans[first : first + STREAMS]
            ):
                digest.update(piece)
                to.write(piece)
    to.flush()
    return digest.hexdigest()


def _mapped(path: Path, keeper: Any = None) -> MappedColumns:
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            names = set(file.keys())
            tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise ShardError(f"{path} is no file of columns ({type(error).__name__}: {error}); {CURE}") from error
    version = (about.get("format"), about.get("version")) if isinstance(about, dict) else None
    if version != (FORMAT, VERSION):
        raise ShardError(f"{path}: format {version}, this version reads {(FORMAT, VERSION)}; {CURE}")
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    kinds = {**DTYPES, KEY_BYTES: np.uint8, KEY_ENDS: np.int64}
    ends = arrays.get(KEY_ENDS, np.zeros(0))
    shapes = {**dict.fromkeys(kinds, ends.shape), "video_sha256": (len(ends), 32)}
    shapes[KEY_BYTES] = (len(arrays.get(KEY_BYTES, ())),)
    if {name: (array.dtype, array.shape) for name, array in arrays.items()} != {
        name: (np.dtype(kind), shapes[name]) for name, kind in kinds.items()
    }:
        raise ShardError(f"{path} does not have the columns {' '.join(sorted(kinds))}, each of a value a clip; {CURE}")
    for array in arrays.values():
        array.flags.writeable = False
    suffixes = about.get("suffixes")
    if not isinstance(suffixes, list) or len(suffixes) > 256 or not all(isinstance(each, str) for each in suffixes):
        raise ShardError(f"{path}: its list of suffixes cannot be; {CURE}")
    keys = Texts(arrays.pop(KEY_BYTES), arrays.pop(KEY_ENDS))
    return MappedColumns(keys, arrays, tuple(suffixes), path, _state_of(path), keeper)


def _state_of(path: Path) -> State:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _again(path: Path, state: State) -> MappedColumns:
    """What another process has checked, mapped into this one."""
    if not path.is_file():
        raise ShardError(f"{path} is missing since this run began; {CURE}")
    columns = _mapped(path)
    if columns.state != state:
        raise ShardError(f"{path} is not what it was when this run began; start again, without packing meanwhile")
    return columns
