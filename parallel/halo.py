"""The exchange of edges between neighbours along a dim that the ranks divide, with its gradient.

A convolution that reads `before` entries back and `after` ahead needs, on each rank, the last of the previous
rank's and the first of the next rank's entries. One all-to-all moves both, and only between neighbours; in the
backward pass their gradients go back the same way and are added to that of the entries they are copies of.
It keeps the gradient rule of `parallel/sequence.py`: the map is linear and its backward the exact transpose, so
between `split` and `gather` nothing needs another scale.

    rank r - 1 | . . . a b |        rank r | c d . . e |        rank r + 1 | f . . . . |
    halo(before=2, after=1) on rank r: front = a b, back = f
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from parallel.collectives import group_name


class Edges(NamedTuple):
    """A part, what the previous rank holds in front of it and the next behind it; empty where there is no such rank."""

    x: Tensor
    front: Tensor
    back: Tensor


class _Line(NamedTuple):
    """This rank's place among `size` ranks in a row."""

    rank: int
    size: int
    group: str

    @property
    def last(self) -> bool:
        return self.rank + 1 == self.size

    def swap(self, to_previous: Tensor, to_next: Tensor, from_previous: int, from_next: int) -> tuple[Tensor, Tensor]:
        """Entries of dim 0 to both neighbours, and theirs. At an end of the row nothing comes or goes."""
        if self.rank == 0:
            to_previous, from_previous = to_previous[:0], 0
        if self.last:
            to_next, from_next = to_next[:0], 0
        sent, received = [0] * self.size, [0] * self.size
        if self.rank > 0:
            sent[self.rank - 1], received[self.rank - 1] = len(to_previous), from_previous
        if not self.last:
            sent[self.rank + 1], received[self.rank + 1] = len(to_next), from_next
        both = torch.cat((to_previous, to_next)).contiguous()
        moved = torch.ops._c10d_functional.all_to_all_single(both, received, sent, self.group)
        front, back = torch.ops._c10d_functional.wait_tensor(moved).split((from_previous, from_next))
        return front, back


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dim: int, before: int, after: int, line: tuple[int, int, str]
    ) -> tuple[Tensor, ...]:
        ctx.dim, ctx.before, ctx.after, ctx.line = dim, before, after, line
        first = x.movedim(dim, 0)
        front, back = _Line(*line).swap(first[:after], first[len(first) - before :], before, after)
        return x.view_as(x), front.movedim(0, dim).contiguous(), back.movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, front: Tensor, back: Tensor) -> tuple[Tensor, None, None, None, None]:
        dim, line = ctx.dim, _Line(*ctx.line)
        head, tail = line.swap(front.movedim(dim, 0), back.movedim(dim, 0), ctx.after, ctx.before)
        total = grad.clone()
        total.narrow(dim, 0, len(head)).add_(head.movedim(0, dim))
        total.narrow(dim, total.shape[dim] - len(tail), len(tail)).add_(tail.movedim(0, dim))
        return total, None, None, None, None


def halo(x: Tensor, dim: int, before: int, after: int, mesh: DeviceMesh) -> Edges:
    """The neighbours' edges of `dim`: `before` entries of the previous rank's end, `after` of the next rank's start.

    Every rank of the one dim of `mesh` calls it with the same numbers, and so does its backward pass: use the
    returned `x` and not the one passed in. On the first rank `front` has 0 entries, on the last one `back`.

    Raises RuntimeError where this rank holds less than it has to send.
    """
    if x.shape[dim] < max(before, after):
        raise RuntimeError(
            f"rank {mesh.get_local_rank()} of {mesh.size()} holds {x.shape[dim]} entries of dim {dim}, but its "
            f"neighbours need {max(before, after)}: an edge comes from one rank only; divide over fewer ranks"
        )
    line = (mesh.get_local_rank(), mesh.size(), group_name(mesh))
    return Edges(*_Halo.apply(x, dim, before, after, line))  # type: ignore[no-untyped-call]
