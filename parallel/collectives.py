"""Collectives with gradients, on one dim of a mesh.

The operators under torch's functional collectives throughout: they run under `torch.compile(fullgraph=True)`,
where the calls of `torch.distributed` do not. `group` is the name of a process group, `size` its ranks.

| function     | forward                   | backward                  |
|--------------|---------------------------|---------------------------|
| enter_tensor | identity                  | sum over ranks            |
| leave_tensor | sum over ranks            | identity                  |
| first_only   | zeros except on rank 0    | identity                  |
| split        | this rank's part of a dim | all-gather, divided by n  |
| gather       | all-gather of a dim       | reduce-scatter, summed    |
| exchange     | all-to-all of dim 0       | all-to-all of dim 0       |
| deal         | all-to-all, uneven parts  | the same, sizes exchanged |
| pass_on      | to the next rank          | (none: see `ring.py`)     |

The first three are f and g of Megatron-LM (1909.08053, section 3). `split` and `gather` keep one rule: between
them every activation gradient is n times the true one, so a parameter's gradient is the mean over the ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def group_name(mesh: DeviceMesh) -> str:
    """Of a mesh with one dim."""
    return str(mesh.get_group().group_name)


def _wait(x: Tensor) -> Tensor:
    done: Tensor = torch.ops._c10d_functional.wait_tensor(x)
    return done


def _all_reduce(x: Tensor, group: str) -> Tensor:
    return _wait(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group))


def _all_gather(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    first = x.movedim(dim, 0).contiguous()
    return _wait(torch.ops._c10d_functional.all_gather_into_tensor(first, size, group)).movedim(0, dim)


def _reduce_scatter(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    first = x.movedim(dim, 0).contiguous()
    return _wait(torch.ops._c10d_functional.reduce_scatter_tensor(first, "sum", size, group)).movedim(0, dim)


def _all_to_all(x: Tensor, size: int, group: str) -> Tensor:
    parts = [x.shape[0] // size] * size
    return _deal(x, parts, parts, group)


def _deal(x: Tensor, send: Sequence[int], receive: Sequence[int], group: str) -> Tensor:
    return _wait(torch.ops._c10d_functional.all_to_all_single(x.contiguous(), receive, send, group))


class _EnterTensor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group), None


class _LeaveTensor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _FirstOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first: bool) -> Tensor:
        return x.view_as(x) if first else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, rank: int, size: int, group: str) -> Tensor:
        ctx.dim, ctx.size, ctx.group = dim, size, group
        own = x.shape[dim] // size
        return x.narrow(dim, rank * own, own).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _all_gather(grad, ctx.dim, ctx.size, ctx.group) / ctx.size, None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int, group: str) -> Tensor:
        ctx.dim, ctx.size, ctx.group = dim, size, group
        return _all_gather(x, dim, size, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _reduce_scatter(grad, ctx.dim, ctx.size, ctx.group), None, None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: str) -> Tensor:
        ctx.size, ctx.group = size, group
        return _all_to_all(x, size, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_to_all(grad, ctx.size, ctx.group), None, None


class _Deal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: Sequence[int], receive: Sequence[int], group: str) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _deal(x, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _deal(grad, ctx.receive, ctx.send, ctx.group), None, None, None


def _apply(function: Any, *args: Any) -> Tensor:
    out: Tensor = function.apply(*args)
    return out


def enter_tensor(x: Tensor, group: str) -> Tensor:
    """The same x on every rank, of which each computes a part: its gradient is the sum of theirs."""
    return _apply(_EnterTensor, x, group)


def leave_tensor(x: Tensor, group: str) -> Tensor:
    """The sum of the ranks' partial results, the same on every rank from here on."""
    return _apply(_LeaveTensor, x, group)


def first_only(x: Tensor, first: bool) -> Tensor:
    """A term that `leave_tensor` is to count once; every rank's copy still gets its gradient."""
    return _apply(_FirstOnly, x, first)


def split(x: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    """This rank's part of a dim that the ranks divide: (..., n s, ...) -> (..., s, ...)."""
    return _apply(_Split, x, dim, mesh.get_local_rank(), mesh.size(), group_name(mesh))


def gather(x: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    """All parts of a dim, in the order of ranks: (..., s, ...) -> (..., n s, ...)."""
    return _apply(_Gather, x, dim, mesh.size(), group_name(mesh))


def exchange(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Part r of dim 0 goes to rank r; part r of the result came from rank r: (n m, ...) -> (n m, ...)."""
    return _apply(_Exchange, x, mesh.size(), group_name(mesh))


def deal(x: Tensor, send: Sequence[int], receive: Sequence[int], mesh: DeviceMesh) -> Tensor:
    """`send[r]` rows of dim 0 go to rank r, in order; `receive[r]` rows of the result came from rank r."""
    return _apply(_Deal, x, send, receive, group_name(mesh))


def pass_on(x: Tensor, rank: int, size: int, group: str) -> Tensor:
    """Start to send x to the next rank, the last rank's to the first; `arrived` gives what the rank before sent.

    An all-to-all with one part that is not empty: it runs beside the arithmetic until it is waited for, and compiles.
    """
    send, receive = [0] * size, [0] * size
    send[(rank + 1) % size] = receive[rank - 1] = x.shape[0]
    on_the_way: Tensor = torch.ops._c10d_functional.all_to_all_single(x.contiguous(), receive, send, group)
    return on_the_way


def arrived(on_the_way: Tensor) -> Tensor:
    """Wait for what `pass_on` started."""
    return _wait(on_the_way)
