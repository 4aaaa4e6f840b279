"""Checkpoints: torch.distributed.checkpoint in safetensors files, under a manifest with hashes.

One folder per save, `step-00000500/`: DCP's safetensors shards and `manifest.json` (format, step, the
caller's facts, name, shape and dtype of every tensor, size and SHA-256 of every file, and its own). It is written
as `step-00000500.partial` and renamed when whole and synced, so a crash in mid-save leaves the previous one.
DCP's own `.metadata` is a pickle; the safetensors storage does without it, so nothing here is unpickled.
A tensor may be sharded in any way on save and in any other on load: names and global shapes are all that
counts.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})(\.partial)?")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the folder and the cure."""


def save(root: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Write `root/step-XXXXXXXX` whole or not at all; returns the folder.

    Raises CheckpointError when the disk does not take it (full, read-only); the partial folder is removed and
    every earlier checkpoint is as it was.
    """
    folder = root / f"step-{step:08d}"
    partial = folder.with_suffix(".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with _one_process():
            dcp_save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True))
        _write_manifest(partial, step, tensors, facts)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        _sync(root)
    except (OSError, CheckpointException, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = _reason(error)
        raise CheckpointError(
            f"cannot save {folder}: {reason}; free space or choose another run_dir, then run the same command "
            "again: earlier checkpoints are untouched"
        ) from error
    return folder


def steps(root: Path) -> list[int]:
    """Steps of the whole checkpoints under `root`, ascending. Partial folders do not count."""
    if not root.is_dir():
        return []
    found = [step for path in root.iterdir() if (path / MANIFEST).is_file() and (step := _step_of(path)) is not None]
    return sorted(found)


def _step_of(path: Path) -> int | None:
    """The step of a folder that has a checkpoint's name, as `folder_of` gives it."""
    match = _NAME.fullmatch(path.name)
    step = int(match[1]) if match else None
    return step if step is not None and path == folder_of(path.parent, step) else None


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step-{step:08d}"


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what crashed saves left behind."""
    for step in steps(root)[:-keep]:
        shutil.rmtree(folder_of(root, step), ignore_errors=True)
    for partial in root.glob("*.partial"):
        if _NAME.fullmatch(partial.name):
            shutil.rmtree(partial, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises CheckpointError where it is missing or damaged."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        found, digest = manifest["format"], manifest.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{path} is missing or damaged ({reason}); delete {folder} to use an earlier one"
        ) from error
    if found != FORMAT:
        raise CheckpointError(f"{folder} has checkpoint format {found}; this version reads format {FORMAT}")
    if digest != _own_hash(manifest):
        _damaged(path, "its content differs from the hash that it holds")
    return dict(manifest)


def verify(folder: Path) -> dict[str, Any]:
    """Check size and hash of every file; returns the manifest, raises CheckpointError naming the bad file."""
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size != expected["bytes"]:
            _damaged(path, f"{size} bytes instead of {expected['bytes']}" if size >= 0 else "missing")
        if _sha256(path) != expected["sha256"]:
            _damaged(path, "its SHA-256 differs from the manifest's")
    return manifest


def load(folder: Path, tensors: Mapping[str, Tensor], prefix: str | None = None) -> dict[str, Any]:
    """Fill `tensors` in place from a checkpoint, whatever layout wrote it; returns its facts.

    Every tensor asked for must be there with the same global shape and dtype, and every tensor there whose name
    starts with `prefix` must be asked for: "" for the whole checkpoint, None for any choice of it. Raises
    CheckpointError otherwise, before anything is changed.
    """
    manifest = verify(folder)
    faults = list(_misfits(manifest["tensors"], tensors, prefix))
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise CheckpointError(
            f"{folder} does not fit this model: {'; '.join(faults[:4])}{more}. Resume with the config that wrote "
            "it, or start a new run_dir"
        )
    with _one_process():
        dcp_load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)))
    return dict(manifest["facts"])


def _misfits(stored: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str | None) -> Iterator[str]:
    """What keeps `tensors` from being loaded from the stored ones, one phrase a tensor."""
    for name, tensor in tensors.items():
        kept = stored.get(name)
        if kept is None:
            yield f"{name} is not in it"
        elif list(tensor.shape) != kept["shape"]:
            yield f"{name} is {tuple(kept['shape'])} there and {tuple(tensor.shape)} here"
        elif _dtype(tensor) != kept["dtype"]:
            yield f"{name} is {kept['dtype']} there and {_dtype(tensor)} here"
    if prefix is not None:
        yield from (f"{name} has no place here" for name in stored if name.startswith(prefix) and name not in tensors)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _write_manifest(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(folder.iterdir())}
    shapes = {name: {"shape": list(t.shape), "dtype": _dtype(t)} for name, t in tensors.items()}
    manifest = {"format": FORMAT, "step": step, "facts": dict(facts), "files": files, "tensors": shapes}
    manifest["sha256"] = _own_hash(manifest)
    with (folder / MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(folder)


def _own_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content, whatever its white space."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


@contextmanager
def _one_process() -> Iterator[None]:
    """Without the warning that a save outside of torch.distributed is a save by one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(path: Path, what: str) -> None:
    raise CheckpointError(
        f"{path} is damaged: {what}. Nothing was changed; restore the file, or delete {path.parent} to resume "
        "from the checkpoint before it"
    )


def _reason(error: BaseException) -> str:
    failures = getattr(error, "failures", None)
    if failures:
        return "; ".join(str(failure[0]) for failure in failures.values())
    return str(error)
