"""DTensors, part by part: what this rank holds of a tensor, where that lies in the full one, and writing it.

Initial values, loaded weights and checkpoints go this way, on plain tensors as well: the numbers of a parameter depend
on its name, never on the layout. Nothing here communicates but `full_tensors`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor.placement_types import Shard, _StridedShard


class Box(NamedTuple):
    """A rectangular part of a tensor: where it begins and how long it is, in each dim."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        product = 1
        for size in self.sizes:
            product *= size
        return product

    def overlap(self, other: "Box") -> "Box | None":
        """What both hold, or None."""
        starts = tuple(map(max, self.offsets, other.offsets))
        ends = [min(a + n, b + m) for a, n, b, m in zip(*self, *other, strict=True)]
        sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return Box(starts, sizes) if all(size > 0 for size in sizes) else None

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """The index of this box in a tensor that holds `outer`."""
        starts = [own - first for own, first in zip(self.offsets, outer.offsets, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True))


def as_box(told: Sequence[Sequence[int]]) -> Box:
    """A box as another rank has told of it."""
    offsets, sizes = told
    return Box(tuple(offsets), tuple(sizes))


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory with `tensor`; a plain tensor is its own."""
    return cast(Tensor, tensor.to_local()) if isinstance(tensor, DTensor) else tensor.detach()


def local_box(tensor: Tensor) -> Box:
    """Where this rank's part lies in the full tensor. An empty part may lie anywhere. No communication."""
    if not isinstance(tensor, DTensor):
        return Box((0,) * tensor.ndim, tuple(tensor.shape))
    assert not any(p.is_partial() for p in tensor.placements), "a tensor that is not yet summed over ranks"
    full = torch.empty(tensor.shape, device="meta")
    part = local_part(full, tensor.device_mesh, tensor.placements)
    held = tuple(local(tensor).shape)
    assert tuple(part.shape) == held, f"placements {tensor.placements} give {tuple(part.shape)}, the rank holds {held}"
    place, offsets = int(part.storage_offset()), []
    for stride in full.stride():
        offsets.append(place // stride)
        place %= stride
    return Box(tuple(offsets), held)


@torch.no_grad()
def fill(parameter: Tensor, full: Tensor) -> None:
    """Write this rank's part of `full` into a parameter, however it is divided. No communication."""
    if isinstance(parameter, DTensor):
        local = parameter.to_local()
        local.copy_(local_part(full, parameter.device_mesh, parameter.placements))
    else:
        parameter.copy_(full)


@torch.no_grad()
def full_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same names with whole tensors, on every rank; all ranks must call it alike."""
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def local_part(full: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    """The part of a full tensor that placements give to this rank, which may be empty.

    FSDP2 marks a dim that tensor parallelism has cut before with `_StridedShard`: its order is from the last mesh
    dim to the first; else it is from the first to the last. Parts are of ceil(size / n) entries, the last ones short.
    """
    axes = list(enumerate(placements))
    if any(isinstance(p, _StridedShard) for p in placements):
        axes.reverse()
    for axis, placement in axes:
        if isinstance(placement, Shard | _StridedShard):
            size, length = mesh.size(axis), full.shape[placement.dim]
            own = -(-length // size)
            start = min(length, own * mesh.get_local_rank(axis))
            full = full.narrow(placement.dim, start, min(own, length - start))
    return full
