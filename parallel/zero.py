"""ZeRO (1910.02054) by FSDP2 over replicas and the flattened shard x sequence ranks.

A sequence rank holds other tokens of the same rows, and every parameter's gradient is the mean over data and
sequence ranks, so both are one axis here. Parameters that tensor parallelism has divided are divided further.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor.placement_types import Shard, _StridedShard

from parallel.names import modules


def apply_zero(
    module: nn.Module,
    blocks: Sequence[str],
    mesh: DeviceMesh,
    keep_gathered: bool = False,
    reduce_dtype: torch.dtype | None = None,
) -> None:
    """Shard the parameters of `module`, in place: each module that fits `blocks` as one unit, the rest as another.

    Args:
        mesh: 1 dim to shard over, or 2 dims, (replicas, shards).
        keep_gathered: keep a unit's whole parameters from forward to backward (ZeRO-2) instead of gathering
            them twice (ZeRO-3).
        reduce_dtype: in which gradients are averaged; None is the parameters' own.

    Raises PlanError where a pattern fits no module.
    """
    policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    for found in modules(module, blocks).values():
        fully_shard(found, mesh=mesh, reshard_after_forward=not keep_gathered, mp_policy=policy)
    fully_shard(module, mesh=mesh, reshard_after_forward=not keep_gathered, mp_policy=policy)


@torch.no_grad()
def fill(parameter: Tensor, full: Tensor) -> None:
    """Write this rank's part of `full` into a parameter, however it is divided. No communication."""
    if isinstance(parameter, DTensor):
        local = parameter.to_local()
        local.copy_(local_part(full, parameter.device_mesh, parameter.placements))
    else:
        parameter.copy_(full)


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
