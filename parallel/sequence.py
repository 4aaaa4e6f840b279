"""Sequence parallelism from outside: each rank holds a share of the video tokens of the same rows.

The tokens are padded and cut after the modules that make them, gathered and trimmed before they are read as a
whole; what lies between works token by token except the cores, each of which gets a module around it that
moves tokens. Names of parameters stay, because a core has none.

The gradient rule: `split` returns the mean of what the ranks send back, `gather` their sum (of n equal
gradients), so between them activation gradients are n times the true ones, and every parameter's gradient, inside
and outside, is the mean over the ranks. Averaging over data x sequence is therefore all that is left to do.

What the seams expect of a module that takes part: a core is called as (q_BSNK, k_BSNK, v_BSNK, grid, bias, text),
where `grid.num_tokens` counts the tokens of the whole row, `bias` has heads in dim 0, and tensors of 4 dims in
the tuple `text` have heads in dim 2.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from parallel.collectives import gather, split
from parallel.names import modules

WrapCore = Callable[[nn.Module, DeviceMesh], nn.Module]


def apply_sequence(
    module: nn.Module,
    cut: Mapping[str, Mapping[int, int]],
    whole: Mapping[str, int],
    counted: str,
    cores: Sequence[str],
    mesh: DeviceMesh,
    wrap: WrapCore,
) -> None:
    """Divide the tokens of `module` over the one dim of `mesh`, in place.

    Args:
        cut: pattern -> {output: dim}; these outputs of the module are cut in that dim (output 0 is the only one of
            a module that returns a tensor).
        whole: pattern -> dim in which its output is made whole.
        counted: the module around `whole` whose arguments hold the grid.
        cores: patterns of the modules that mix tokens.
        wrap: (core, mesh) -> what takes its place (`parallel.ulysses.UlyssesCore`).

    Raises PlanError where a pattern fits no module.
    """
    for pattern, dims in cut.items():
        for found in modules(module, [pattern]).values():
            found.register_forward_hook(_Cut(dims, mesh))
    for pattern, dim in whole.items():
        trim = _Whole(dim, mesh)
        for found in modules(module, [pattern]).values():
            found.register_forward_hook(trim)
        for found in modules(module, [counted]).values():
            found.register_forward_pre_hook(trim.count)
    for name in modules(module, cores):
        owner, _, own_name = name.rpartition(".")
        setattr(module.get_submodule(owner), own_name, wrap(module.get_submodule(name), mesh))


def num_tokens(args: tuple[Any, ...]) -> int:
    """Tokens of the whole row, as the grid among the arguments tells."""
    for arg in args:
        count = getattr(arg, "num_tokens", None)
        if isinstance(count, int):
            return count
    raise RuntimeError(
        f"none of {len(args)} positional arguments tells num_tokens, so padding cannot be told from tokens; "
        "pass the grid by position"
    )


def pad_to(x: Tensor, dim: int, length: int) -> Tensor:
    """x with zeros appended in `dim` up to `length`."""
    missing = length - x.shape[dim]
    if not missing:
        return x
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing))


def share(tokens: int, size: int) -> int:
    """Tokens of each of `size` ranks, padding included."""
    return -(-tokens // size)


class _Cut:
    """A forward hook: the outputs' shares of this rank."""

    def __init__(self, dims: Mapping[int, int], mesh: DeviceMesh):
        self.dims, self.mesh = dims, mesh

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return self._own(output, self.dims[0])
        parts = [self._own(x, self.dims[i]) if i in self.dims else x for i, x in enumerate(output)]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)

    def _own(self, x: Tensor, dim: int) -> Tensor:
        size = self.mesh.size()
        return split(pad_to(x, dim, share(x.shape[dim], size) * size), dim, self.mesh)


class _Whole:
    """A forward hook that gathers and trims, and a pre-hook that is told the number of tokens."""

    def __init__(self, dim: int, mesh: DeviceMesh):
        self.dim, self.mesh, self.tokens = dim, mesh, 0

    def count(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.tokens = num_tokens(args)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return gather(output, self.dim, self.mesh).narrow(self.dim, 0, self.tokens)
