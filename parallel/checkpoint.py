"""Checkpoints: safetensors files under a manifest with hashes, saved on any layout and loaded on any other.

A tensor is known by its name and its global shape. On save it may be plain or a DTensor, divided over any meshes;
each rank writes parts of its own (`save_plan`, `async_save`), and the folder is renamed when whole (`manifest`).
On load each rank reads what overlaps its own parts. Nothing is ever unpickled: DCP's own `.metadata` is a pickle,
its safetensors format does without, and that is the format of the files (`shard_file`).
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from parallel.async_save import Saver
from parallel.dtensor import as_box, local, local_box
from parallel.exchange import any_rank, exchange, first_fault, num_ranks, own_rank
from parallel.manifest import (
    CheckpointError,
    DamagedError,
    folder_of,
    prune,
    read_manifest,
    remove,
    set_aside,
    steps,
    verify,
    verify_file,
)
from parallel.save_plan import dtype_name
from parallel.stored import Index, Stored, index_of

__all__ = ["CheckpointError", "DamagedError", "Saver", "folder_of", "load", "open_stored", "prune", "read_manifest",
           "remove", "save", "set_aside", "steps", "verify"]  # fmt: skip

T = TypeVar("T")


def save(root: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Write `root/step-XXXXXXXX` whole or not at all, and wait for it; returns the folder. Collective.

    Raises CheckpointError when the disk does not take it (full, read-only); the partial folder is removed and
    every earlier checkpoint is as it was.
    """
    return Saver(background=False).save(root, step, tensors, facts)


def load(folder: Path, tensors: Mapping[str, Tensor], prefix: str | None = None) -> dict[str, Any]:
    """Fill `tensors` in place from a checkpoint, whatever layout wrote it; returns its facts. Collective.

    Every tensor asked for must be there with the same global shape and dtype, and every tensor there whose name
    starts with `prefix` must be asked for by some rank: "" for the whole checkpoint, None for any choice of it.
    Raises CheckpointError otherwise, DamagedError where the files are at fault, on every rank the same and before
    anything is changed. Ranks share the checking of the files' hashes.
    """
    manifest = _agreed(lambda: read_manifest(folder))
    index = _verified(folder, manifest)
    _check_fit(folder, manifest["tensors"], tensors, prefix)
    stored = Stored(folder, manifest, index)
    _agreed(lambda: stored.fill((name, local_box(t), local(t)) for name, t in tensors.items()))
    return dict(manifest["facts"])


def open_stored(folder: Path) -> tuple[dict[str, Any], Stored]:
    """The manifest and the tensors of a verified checkpoint, for one process. Raises CheckpointError."""
    manifest = verify(folder)
    return manifest, Stored(folder, manifest, index_of(folder, manifest["files"]))


def _agreed(call: Callable[[], T]) -> T:
    """The result of a call that reads; where it fails on one rank, its error on all."""
    result, error = None, None
    try:
        result = call()
    except (CheckpointError, OSError) as caught:
        error = caught
    fault = first_fault(None if error is None else str(error))
    if fault is not None:
        damaged = any_rank(isinstance(error, DamagedError))
        raise (DamagedError if damaged else CheckpointError)(fault) from error
    return result  # type: ignore[return-value]


def _verified(folder: Path, manifest: Mapping[str, Any]) -> Index:
    """What lies where, once every file has been checked by one of the ranks."""
    own = list(manifest["files"].items())[own_rank() :: num_ranks()]
    index: Index = {}
    fault = None
    try:
        for name, expected in own:
            verify_file(folder / name, expected)
        index = index_of(folder, (name for name, _ in own))
    except CheckpointError as error:
        fault = str(error)
    found: list[tuple[str | None, Any]] = exchange((fault, index))
    if text := min((text for text, _ in found if text), default=None):
        raise DamagedError(text)
    whole: Index = {}
    for _, part in found:
        for name, places in part.items():
            whole.setdefault(name, []).extend((file, as_box(box)) for file, box in places)
    return whole


def _check_fit(folder: Path, stored: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str | None) -> None:
    """Refuse what does not fit, with the faults of all ranks together."""
    # As bits of one number: thousands of names from each of many ranks would be a long message.
    names = list(stored)
    asked = sum(1 << place for place, name in enumerate(names) if name in tensors)
    replies = exchange((list(_misfits(stored, tensors)), asked))
    faults = list(dict.fromkeys(fault for found, _ in replies for fault in found))
    if prefix is not None:
        anywhere = 0
        for _, bits in replies:
            anywhere |= bits
        left = (n for place, n in enumerate(names) if n.startswith(prefix) and not anywhere >> place & 1)
        faults += [f"{name} has no place here" for name in left]
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise CheckpointError(
            f"{folder} does not fit this model: {'; '.join(faults[:4])}{more}. Resume with the config that wrote "
            "it, or start a new run_dir"
        )


def _misfits(stored: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What keeps `tensors` from being loaded from the stored ones, one phrase a tensor."""
    for name, tensor in tensors.items():
        kept = stored.get(name)
        if kept is None:
            yield f"{name} is not in it"
        elif list(tensor.shape) != kept["shape"]:
            yield f"{name} is {tuple(kept['shape'])} there and {tuple(tensor.shape)} here"
        elif dtype_name(tensor.dtype) != kept["dtype"]:
            yield f"{name} is {kept['dtype']} there and {dtype_name(tensor.dtype)} here"
