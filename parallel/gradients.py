"""The gradient norm over every axis of a layout, and clipping by it (1211.5063).

torch's `get_total_norm` wants all gradients on one mesh; here some are divided over tensor ranks, some over data ranks,
some over both, and a module without a tensor plan over none.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard, _StridedShard


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients together as one process would have it, in at least fp32, the same on every rank.

    Squares are summed on each rank and then over exactly those mesh dims that divide the tensor: a replicated gradient
    counts once.
    """
    squares: dict[tuple[DeviceMesh | None, tuple[int, ...]], Tensor] = {}
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        key: tuple[DeviceMesh | None, tuple[int, ...]] = (None, ())
        if isinstance(grad, DTensor):
            assert not any(p.is_partial() for p in grad.placements), "a gradient that is not yet summed over ranks"
            own_dims = (i for i, p in enumerate(grad.placements) if isinstance(p, Shard | _StridedShard))
            key = (grad.device_mesh, tuple(own_dims))
            grad = grad.to_local()
        wide = torch.promote_types(grad.dtype, torch.float32)
        own = torch.linalg.vector_norm(grad, dtype=wide).square()
        squares[key] = squares[key] + own if key in squares else own
    if not squares:
        return torch.zeros(())
    for (mesh, divided), total in squares.items():
        for dim in divided:
            assert mesh is not None
            dist.all_reduce(total, group=mesh.get_group(dim))
    return torch.stack(list(squares.values())).sum().sqrt()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale every gradient in place so that the norm, given as `gradient_norm` returns it, is at most `max_norm`."""
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            grad.mul_(scale)
