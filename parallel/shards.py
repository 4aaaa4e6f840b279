"""This rank's part of a full tensor, and a parameter filled with it.

Initial values and loaded weights are written this way: the numbers of a parameter depend on its name, never on
the layout.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor.placement_types import Shard, _StridedShard


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
