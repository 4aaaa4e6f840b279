"""The tensors of a checkpoint's folder, read part by part, whatever layout wrote them."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from parallel.dtensor import Box
from parallel.manifest import CheckpointError
from parallel.save_plan import as_dtype
from parallel.shard_file import boxes, read

Index = dict[str, list[tuple[str, Box]]]


def index_of(folder: Path, files: Iterable[str]) -> Index:
    """Name -> (file, what of the tensor it holds), of some files of a checkpoint. Raises CheckpointError."""
    found: Index = {}
    for file in files:
        if file.endswith(".safetensors"):
            try:
                held = boxes(folder / file)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"cannot read {folder / file}: {error}; restore it") from error
            for name, box in held.items():
                found.setdefault(name, []).append((file, box))
    return found


class Stored:
    """`index` is that of all files; `manifest` the checkpoint's."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], index: Index):
        self.folder, self.index = folder, index
        self.tensors: dict[str, dict[str, Any]] = manifest["tensors"]

    def whole(self, name: str) -> Tensor:
        """A full tensor, in host memory."""
        facts = self.tensors[name]
        full = torch.empty(facts["shape"], dtype=as_dtype(facts["dtype"]))
        self.fill([(name, Box((0,) * full.ndim, tuple(full.shape)), full)])
        return full

    def fill(self, wanted: Iterable[tuple[str, Box, Tensor]]) -> None:
        """Write the given part of each tensor into the tensor given for it. Raises CheckpointError."""
        by_file: dict[str, list[tuple[str, Box, Box, Tensor]]] = {}
        for name, box, target in wanted:
            for file, stored, part in self._sources(name, box):
                by_file.setdefault(file, []).append((name, stored, part, target[part.within(box)]))
        for file, parts in by_file.items():
            try:
                read(self.folder / file, parts)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"cannot read {self.folder / file}: {error}; restore it and load again"
                ) from error

    def _sources(self, name: str, box: Box) -> Iterator[tuple[str, Box, Box]]:
        """(file, what it holds, what of that is wanted) for all of a part."""
        missing = box.numel
        for file, stored in self.index.get(name, ()) if missing else ():
            part = box.overlap(stored)
            if part is not None:
                missing -= part.numel
                yield file, stored, part
        if missing:
            raise CheckpointError(
                f"{self.folder} lacks {missing} of the {box.numel} numbers of {name}; use another one"
            )
