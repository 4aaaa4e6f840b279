"""The exchange of edges between neighbours along a dim that the ranks divide, with its gradient.

A convolution that reads `before` entries back and `after` ahead needs, on each rank, the last of the previous
rank's and the first of the next rank's entries. One all-to-all moves both, and only between neighbours; in the
backward pass their gradients go back the same way and are added to that of the entries they are copies of.
It keeps the gradient rule of `parallel/sequence.py`: the map is linear and its backward the exact transpose, so
between `split` and `gather` nothing needs another scale.

    rank r - 1 | . . . a b |     rank r | c d . . e |     rank r + 1 | f . . . . |
    halo(before=2, after=1) on rank r: front = a b, back = f
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from parallel.collectives import group_name


class Edges(NamedTuple):
    """What the previous rank holds in front of this rank's part and the next behind it; 0 entries where none is."""

    front: Tensor
    back: Tensor


def _swap(
    to_previous: Tensor, to_next: Tensor, counts: tuple[int, int], line: tuple[int, int, str]
) -> tuple[Tensor, Tensor]:
    """Entries of dim 0 to both neighbours, and `counts` of theirs; all counts at an end of the line are 0."""
    rank, size, group = line
    sent, received = [0] * size, [0] * size
    for neighbour, entries, count in ((rank - 1, to_previous, counts[0]), (rank + 1, to_next, counts[1])):
        if 0 <= neighbour < size:
            sent[neighbour], received[neighbour] = entries.shape[0], count
    both = torch.cat((to_previous, to_next)).contiguous()
    moved = torch.ops._c10d_functional.wait_tensor(
        torch.ops._c10d_functional.all_to_all_single(both, received, sent, group)
    )
    front, back = moved.split(counts)
    return front, back


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, to_previous: Tensor, to_next: Tensor, counts: tuple[int, int], line: tuple[int, int, str]
    ) -> tuple[Tensor, Tensor]:
        ctx.counts, ctx.line = (to_previous.shape[0], to_next.shape[0]), line
        front, back = _swap(to_previous, to_next, counts, line)
        return front.clone(), back.clone()  # outputs of one Function may not share memory

    @staticmethod
    def backward(ctx: Any, front: Tensor, back: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *_swap(front, back, ctx.counts, ctx.line), None, None


def halo(x: Tensor, dim: int, before: int, after: int, mesh: DeviceMesh) -> Edges:
    """The neighbours' edges of `dim`: `before` entries of the previous rank's end, `after` of the next rank's start.

    Every rank of the one dim of `mesh` calls it with the same numbers and puts both results to use, empty ones
    too: so that every rank's backward pass, and every compiled graph, holds the exchange.

    Raises RuntimeError where this rank holds less than it has to send.
    """
    rank, size = mesh.get_local_rank(), mesh.size()
    if x.shape[dim] < max(before, after):
        raise RuntimeError(
            f"rank {rank} of {size} holds {x.shape[dim]} entries of dim {dim}, but its neighbours need "
            f"{max(before, after)}: an edge comes from one rank only; divide over fewer ranks"
        )
    first = x.movedim(dim, 0)
    to_previous = first[: after if rank > 0 else 0]
    to_next = first[x.shape[dim] - (before if rank + 1 < size else 0) :]
    counts = before if rank > 0 else 0, after if rank + 1 < size else 0
    front, back = _apply(to_previous, to_next, counts, (rank, size, group_name(mesh)))
    return Edges(front.movedim(0, dim), back.movedim(0, dim))


def _apply(*args: Any) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = _Swap.apply(*args)  # type: ignore[no-untyped-call]
    return out
