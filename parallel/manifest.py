"""The folders of checkpoints, and the manifest that makes a folder one.

`step-00000500/` holds safetensors files and `manifest.json`: format, step, the caller's facts, name, shape and
dtype of every tensor, size and SHA-256 of every file, and its own. What is being written is called
`step-00000500.partial`, what is being deleted `step-00000500.old.partial`.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})(\.old)?(\.partial)?")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the folder and the cure."""


class DamagedError(CheckpointError):
    """A checkpoint whose files are not what was written."""


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step-{step:08d}"


def partial_of(folder: Path) -> Path:
    """Where it lies while it is written."""
    return folder.with_suffix(".partial")


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


def prune(root: Path, keep: int, keep_every: int = 0) -> None:
    """Delete old checkpoints, and what crashed saves left behind; for when nothing is being written under `root`.

    Kept are the newest `keep` and those whose step is a multiple of `keep_every` (0: none).
    """
    for step in steps(root)[:-keep]:
        if not (keep_every and step % keep_every == 0):
            remove(folder_of(root, step))
    for partial in root.glob("*.partial"):
        if _NAME.fullmatch(partial.name):
            shutil.rmtree(partial, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete a folder, as far as the disk allows it. It loses its name first: one cut short is no checkpoint."""
    aside = folder.with_name(f"{folder.name}.old.partial")
    if aside.exists():
        shutil.rmtree(aside, ignore_errors=True)
    with suppress(OSError):
        folder.replace(aside)
    shutil.rmtree(aside if aside.exists() else folder, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Take a damaged checkpoint's name away and keep what there is of it; returns where it lies now."""
    aside = folder.with_suffix(".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    folder.replace(aside)
    sync(folder.parent)
    return aside


def write_manifest(
    folder: Path, step: int, tensors: Mapping[str, Any], facts: Mapping[str, Any], files: Mapping[str, Any]
) -> None:
    """The last file of a folder. `tensors`: name -> shape and dtype; `files`: name -> bytes and sha256."""
    manifest = {
        "format": FORMAT, "step": step, "facts": dict(facts), "files": dict(sorted(files.items())),
        "tensors": dict(tensors),
    }  # fmt: skip
    manifest["sha256"] = _own_hash(manifest)
    write_json(folder / MANIFEST, manifest)


def write_json(path: Path, value: Any) -> None:
    """Write and sync a file that has its name only when it is whole."""
    partial = path.with_name(f"{path.name}.writing")
    with partial.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises CheckpointError where it is missing or damaged."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        found, digest = manifest["format"], manifest.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        unreadable = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        raise (CheckpointError if unreadable else DamagedError)(
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
        verify_file(folder / name, expected)
    return manifest


def verify_file(path: Path, expected: Mapping[str, Any]) -> None:
    """Check a file against its entry in the manifest. Raises CheckpointError."""
    size = path.stat().st_size if path.is_file() else -1
    if size != expected["bytes"]:
        _damaged(path, f"{size} bytes instead of {expected['bytes']}" if size >= 0 else "missing")
    if _sha256(path) != expected["sha256"]:
        _damaged(path, "its SHA-256 differs from the manifest's")


def sync(folder: Path) -> None:
    """Make what was created and renamed in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _own_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content, whatever its white space."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(path: Path, what: str) -> NoReturn:
    raise DamagedError(
        f"{path} is damaged: {what}. Nothing was changed; restore the file, or delete {path.parent} to resume "
        "from the checkpoint before it"
    )
