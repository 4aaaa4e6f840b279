"""Work that needs whole matrices, on matrices that ranks divide between them.

Each rank gets some of the matrices whole, works on those, and gives every rank its part of the results back: two
all-to-alls a mesh dim that divides them, each moving what the rank holds, and no matrix is worked on twice by the
ranks that divide it. Where two mesh dims divide (tensor and zero), the second exchange runs within the first.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard, _StridedShard

from parallel.dtensor import local


class Cut(NamedTuple):
    """One division of a dim: the ranks' group, this rank in it, the length that each rank gets."""

    group: dist.ProcessGroup
    rank: int
    dim: int
    lengths: tuple[int, ...]


def cuts(like: Tensor) -> list[Cut]:
    """How a tensor came to be divided, the last division first; none for a plain one."""
    if not isinstance(like, DTensor):
        return []
    axes = list(enumerate(like.placements))
    # The order of cutting, as `parallel.dtensor.local_part` has it.
    if any(isinstance(p, _StridedShard) for p in like.placements):
        axes.reverse()
    shape, found = list(like.shape), []
    for axis, placement in axes:
        if not isinstance(placement, Shard | _StridedShard):
            continue
        mesh, dim, length = like.device_mesh, placement.dim, shape[placement.dim]
        size, own = mesh.size(axis), mesh.get_local_rank(axis)
        most = -(-length // size)
        lengths = tuple(max(0, min(most, length - n * most)) for n in range(size))
        shape[dim] = lengths[own]
        found.append(Cut(mesh.get_group(axis), own, dim, lengths))
    return found[::-1]


@torch.no_grad()
def on_whole(parts: Sequence[Tensor], like: Tensor, work: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """`work` applied to whole matrices, of which each rank passes and gets back its own parts.

    Args:
        parts: this rank's part (r, c) of each of M matrices of one shape, all divided as `like` is.
        work: (X, R, C) -> the same shape, for any X from 1; it must treat each matrix on its own.

    Collective over the ranks that divide `like`. The work is done on the device of its mesh.
    """
    x_Mrc = torch.stack([local(part) for part in parts])
    device = x_Mrc.device
    if isinstance(like, DTensor):
        x_Mrc = x_Mrc.to(like.device_mesh.device_type)
    return list(_recurse(x_Mrc, cuts(like), work).to(device).unbind())


def _recurse(x_Mrc: Tensor, left: list[Cut], work: Callable[[Tensor], Tensor]) -> Tensor:
    if not left:
        return work(x_Mrc) if len(x_Mrc) else x_Mrc
    cut, *others = left
    return _back(_recurse(_to_owners(x_Mrc, cut), others, work), cut, tuple(x_Mrc.shape))


def _owned(num: int, rank: int, size: int) -> int:
    """How many of `num` matrices a rank owns: every size-th."""
    return len(range(rank, num, size))


def _to_owners(x_Mrc: Tensor, cut: Cut) -> Tensor:
    """Parts of all matrices -> all parts of the matrices that this rank owns, put together."""
    size, (num, *shape) = len(cut.lengths), x_Mrc.shape
    own = _owned(num, cut.rank, size)
    shapes = [(own, *shape[: cut.dim], length, *shape[cut.dim + 1 :]) for length in cut.lengths]
    sent = [x_Mrc[n::size].reshape(-1) for n in range(size)]
    got = _exchange(sent, [torch.Size(s).numel() for s in shapes], cut.group)
    return torch.cat([part.view(s) for part, s in zip(got, shapes, strict=True)], dim=1 + cut.dim)


def _back(y_mRC: Tensor, cut: Cut, shape: tuple[int, ...]) -> Tensor:
    """The inverse."""
    size, num = len(cut.lengths), shape[0]
    sent = [part.reshape(-1) for part in torch.split_with_sizes(y_mRC, cut.lengths, 1 + cut.dim)]
    shapes = [(_owned(num, n, size), *shape[1:]) for n in range(size)]
    got = _exchange(sent, [torch.Size(s).numel() for s in shapes], cut.group)
    out = y_mRC.new_empty(shape)
    for n, (part, s) in enumerate(zip(got, shapes, strict=True)):
        out[n::size] = part.view(s)
    return out


def _exchange(sent: list[Tensor], expected: list[int], group: dist.ProcessGroup) -> Sequence[Tensor]:
    """sent[n] goes to rank n of the group; of rank n come `expected[n]` numbers."""
    got = sent[0].new_empty(sum(expected))
    dist.all_to_all_single(got, torch.cat(sent), expected, [len(s) for s in sent], group=group)
    return torch.split_with_sizes(got, expected)
