"""Sequence-sharded norms: between tensor regions every tensor rank works on its own tokens (2205.05198, section 4.2).

Plain tensor parallelism keeps the residual stream whole on every rank: norms, modulation and residual adds are done
n times over, and their activations take as much memory as on one device. Here the tokens are cut over the tensor
ranks after `embed`; a region gathers them and its sum is scattered (g-bar and g of the paper's figure 5), which
sends as much as the all-reduce that it replaces; the head's output is made whole. What a region's layers save is whole
as before, and with activation checkpointing a block keeps its share of the input only.

Positions, text and conditioning stay whole. Each rank uses them, and the parameters between the regions, on its
own tokens, so their gradients are summed over the ranks:

| what                                        | where its gradient is summed                                     |
|---------------------------------------------|------------------------------------------------------------------|
| vectors of a row that act on tokens (AdaLN) | at the output of the module that makes them, one all-reduce      |
| parameters that meet tokens (output, norms)  | where they are read, as for the kind per_head                    |
| row biases                                  | nowhere: they are added before the scatter, and the gradient of  |
|                                             | the scattered sum is gathered                                    |

Unequal shares: tokens are padded to n equal parts. A region that knows the grid strips the padding, since its core must
not see it; one that works token by token keeps it, and the output layer's is cut off.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from parallel.collectives import _all_gather, _apply, _reduce_scatter, enter_tensor, gather, group_name
from parallel.names import PlanError, modules
from parallel.shares import num_tokens, pad_to, share
from parallel.tensor import Entrance, Exit, read_summed


def apply_sharded_norms(
    module: nn.Module,
    cut: Mapping[str, Mapping[int, int]],
    vectors: Sequence[str],
    regions: Mapping[str, tuple[int, ...]],
    whole: Mapping[str, int],
    counted: str,
    before: Sequence[str],
    mesh: DeviceMesh,
    sequence: int = 1,
    beside: Sequence[str] = (),
) -> None:
    """Cut the tokens between the regions of a module that `apply_tensor` has divided over the same `mesh`, in place.

    Comes after `apply_sequence`: a sequence rank's tokens are cut again.

    Args:
        cut: pattern -> {output: dim}, modules whose tokens are cut (of a sequence plan, those without positions).
        vectors: modules whose outputs, one for each row, act on tokens.
        regions: as for `apply_tensor`; argument 0 of each holds the tokens, the others stay whole.
        whole: pattern -> dim of its output that is made whole; its own parameters meet tokens.
        counted: the module around `whole` whose arguments hold the grid; not read without a `whole`.
        before: modules that are done when the tokens are cut, on whole inputs.
        sequence: ranks that share the tokens of a row, each of them ceil(tokens / sequence).
        beside: modules with parameters of their own that work on tokens between the regions (norms with a scale).

    Raises PlanError where a pattern fits no module, or a parameter would meet tokens without a rule.
    """
    seams = _Seams(mesh, sequence)
    outputs = modules(module, whole)
    _check(module, [*modules(module, [*before, *vectors, *regions, *beside]), *outputs])
    for found in modules(module, beside).values():
        read_summed(found, seams.group)
    for pattern, dims in cut.items():
        for found in modules(module, [pattern]).values():
            found.register_forward_hook(_Cut(dims, seams))
    for found in modules(module, vectors).values():
        found.register_forward_hook(seams.sum_gradients)
    for name, found in modules(module, regions).items():
        _turn(name, found, seams)
    for pattern, dim in whole.items():
        last = _Whole(dim, seams)
        for found in modules(module, [pattern]).values():
            read_summed(found, seams.group)
            found.register_forward_hook(last, prepend=True)  # before those of the sequence ranks are gathered
        for found in modules(module, [counted]).values():
            found.register_forward_pre_hook(last.count)


def _check(module: nn.Module, ruled: Sequence[str]) -> None:
    """Every parameter that all ranks hold whole lies in a module with a rule."""
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, DTensor):
            raise PlanError(f"parameter {name} is not divided by a tensor plan; call apply_tensor before")
        inside = any(name.startswith(f"{owner}.") for owner in ruled)
        if not inside and all(isinstance(p, Replicate) for p in parameter.placements):
            raise PlanError(
                f"parameter {name} is in none of the {len(ruled)} modules that are before the cut, regions, vectors or "
                "made whole, so its gradient would be of this rank's tokens only: name its module in one of them"
            )


def _turn(name: str, region: nn.Module, seams: "_Seams") -> None:
    """The region's entrance gathers tokens, and its exits scatter."""
    entrances = [hook for hook in region._forward_pre_hooks.values() if isinstance(hook, Entrance)]
    exits = [hook for part in region.modules() for hook in part._forward_hooks.values() if isinstance(hook, Exit)]
    if not entrances or not exits:
        raise PlanError(
            f"module {name} has {len(entrances)} entrances and {len(exits)} exits of a tensor region; it needs 1 of "
            "each: call apply_tensor with the same regions before"
        )
    for entrance in entrances:
        entrance.tokens = seams.gather
    for leaving in exits:
        leaving.tokens = seams.scatter


class _Seams:
    """What happens to tokens (B, s, D) on the way into a region and out of it."""

    def __init__(self, mesh: DeviceMesh, sequence: int):
        self.mesh, self.sequence = mesh, sequence
        self.group, self.size, self.rank = group_name(mesh), mesh.size(), mesh.get_local_rank()

    def own_count(self, args: tuple[Any, ...]) -> int:
        """Tokens of this rank before they are cut over the tensor ranks."""
        return share(num_tokens(args), self.sequence)

    def gather(self, x_BsD: Tensor, args: tuple[Any, ...]) -> Tensor:
        x = gather(x_BsD, 1, self.mesh)
        return x[:, : self.own_count(args)] if any(hasattr(arg, "num_tokens") for arg in args) else x

    def scatter(self, partial_BSD: Tensor) -> Tensor:
        tokens = share(partial_BSD.shape[1], self.size) * self.size
        return _apply(_Scatter, pad_to(partial_BSD, 1, tokens), 1, self.size, self.group)

    def sum_gradients(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A forward hook. Vectors of one shape enter as one tensor: one all-reduce for all of them."""
        if isinstance(output, Tensor):
            return enter_tensor(output, self.group)
        return type(output)(enter_tensor(torch.stack(output), self.group).unbind())


class _Cut:
    """A forward hook: the outputs' shares of this rank."""

    def __init__(self, dims: Mapping[int, int], seams: _Seams):
        self.dims, self.seams = dims, seams

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return self._own(output, self.dims[0])
        parts = [self._own(x, self.dims[i]) if i in self.dims else x for i, x in enumerate(output)]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)

    def _own(self, x: Tensor, dim: int) -> Tensor:
        s = self.seams
        padded = pad_to(x, dim, share(x.shape[dim], s.size) * s.size)
        return _apply(_CutTokens, padded, dim, s.rank, s.size, s.group)


class _Whole:
    """A forward hook that gathers and trims, and a pre-hook that is told the number of tokens."""

    def __init__(self, dim: int, seams: _Seams):
        self.dim, self.seams, self.tokens = dim, seams, 0

    def count(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.tokens = self.seams.own_count(args)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        s = self.seams
        x = _apply(_WholeTokens, output, self.dim, s.rank, s.size, s.group)
        return x.narrow(self.dim, 0, self.tokens)


class _CutTokens(torch.autograd.Function):
    """Own part of a dim; the parts of the gradient are gathered. Before it, every rank does the same work."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, rank: int, size: int, group: str) -> Tensor:
        ctx.dim, ctx.size, ctx.group = dim, size, group
        own = x.shape[dim] // size
        return x.narrow(dim, rank * own, own).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _all_gather(grad, ctx.dim, ctx.size, ctx.group), None, None, None, None


class _WholeTokens(torch.autograd.Function):
    """All parts of a dim; every rank does the same with them, so of the gradient each keeps its own part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, rank: int, size: int, group: str) -> Tensor:
        ctx.dim, ctx.rank, ctx.own = dim, rank, x.shape[dim]
        return _all_gather(x, dim, size, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return grad.narrow(ctx.dim, ctx.rank * ctx.own, ctx.own).contiguous(), None, None, None, None


class _Scatter(torch.autograd.Function):
    """Own part of the sum of the ranks' partial results; the gradient of each part goes to all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int, group: str) -> Tensor:
        ctx.dim, ctx.size, ctx.group = dim, size, group
        return _reduce_scatter(x, dim, size, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        # Contiguous: what pads and trims it gives other strides in a compiled graph than outside of one.
        return _all_gather(grad, ctx.dim, ctx.size, ctx.group).contiguous(), None, None, None
