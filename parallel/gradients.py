"""The gradient norm over every axis of a layout, clipping by it (1211.5063).

torch's `get_total_norm` wants all gradients on one mesh; here some are divided over tensor ranks, some over data ranks,
some over both, and a module without a tensor plan over none. Squares are summed on each rank first, so what is
sent is one small vector for each process group, however many parameters there are.
"""

from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard, _StridedShard

from parallel.dtensor import local

Key = tuple[DeviceMesh | None, tuple[int, ...], bool]


def complete_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Zero gradients for parameters that took no part in a step on this rank.

    Which of them have none depends on how a layer is computed, and so on the layout; an optimizer leaves such a
    parameter alone, but decays one of gradient 0.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


@torch.no_grad()
def gradient_norm(
    parameters: Iterable[nn.Parameter], pipeline: DeviceMesh | None = None, shared: Collection[nn.Parameter] = ()
) -> Tensor:
    """The 2-norm of all gradients together as one process would have it, in at least fp32, the same on every rank.

    Squares are summed over exactly those mesh dims that divide the tensor: a replicated gradient counts once.

    Args:
        parameters: of this rank, in the same order on every rank of its stage.
        pipeline: the mesh (1 dim) of the stages, each of which has other parameters.
        shared: those of them that every stage holds with the same gradient; the first stage counts them.
    """
    counted, device = {id(p) for p in shared}, torch.device("cpu")
    gradients: dict[Key, list[Tensor]] = {}
    for parameter in parameters:
        grad = parameter.grad
        if grad is not None:
            key, own = _divided(grad, id(parameter) in counted)
            gradients.setdefault(key, []).append(own)
            device = own.device
    squares = {key: _sum_of_squares(own) for key, own in gradients.items()}
    _sum_over_groups(squares)
    first = pipeline is None or pipeline.get_local_rank() == 0
    kept = [total for (_, _, alike), total in squares.items() if first or not alike]
    total = torch.stack(kept).sum() if kept else torch.zeros((), device=device)
    if pipeline is not None:
        # A stage without a gradient takes part too, so the dtype is not that of the gradients.
        total = total.to(pipeline.device_type, torch.float64)
        dist.all_reduce(total, group=pipeline.get_group())
    return total.sqrt()


def _divided(grad: Tensor, shared: bool) -> tuple[Key, Tensor]:
    """Over which dims of which mesh a gradient is divided, and this rank's part."""
    if not isinstance(grad, DTensor):
        return (None, (), shared), grad
    assert not any(p.is_partial() for p in grad.placements), "a gradient that is not yet summed over ranks"
    dims = tuple(i for i, p in enumerate(grad.placements) if isinstance(p, Shard | _StridedShard))
    return (grad.device_mesh, dims, shared), grad.to_local()


def _sum_of_squares(own: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(own, 2, dtype=torch.promote_types(own[0].dtype, torch.float32))
    return torch.stack(norms).square().sum()


def _sum_over_groups(squares: dict[Key, Tensor]) -> None:
    """Sum each entry over the mesh dims of its key, in place: one all-reduce for each process group."""
    groups: dict[str, tuple[dist.ProcessGroup, list[Key]]] = {}
    for key in squares:
        mesh, dims, _ = key
        for dim in dims:
            assert mesh is not None
            group = mesh.get_group(dim)
            groups.setdefault(group.group_name, (group, []))[1].append(key)
            squares[key] = squares[key].to(mesh.device_type)  # offloaded gradients are on the CPU, the groups are not
    for group, keys in groups.values():
        together = torch.stack([squares[key] for key in keys])
        dist.all_reduce(together, group=group)
        squares |= dict(zip(keys, together.unbind(), strict=True))


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale every gradient in place so that the norm, given as `gradient_norm` returns it, is at most `max_norm`."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for parameter in parameters:
        grad = parameter.grad
        if grad is not None:
            own = local(grad)
            by_device.setdefault(own.device, []).append(own)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for device, grads in by_device.items():
        torch._foreach_mul_(grads, scale.to(device, grads[0].dtype))
