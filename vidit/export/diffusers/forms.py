"""How one tensor of ours lies in another library: other order, other shape, the same numbers.

A form is two functions, each the other's inverse, bit for bit. They work on meta tensors too, so shapes are known
before anything is read.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from vidit.config import Model


class Form(NamedTuple):
    """`theirs`: (our tensor, model) -> their tensors; `ours`: the way back."""

    theirs: Callable[[Tensor, Model], tuple[Tensor, ...]]
    ours: Callable[[Sequence[Tensor], Model], Tensor]


def _apart(x: Tensor, c: Model) -> tuple[Tensor, ...]:
    """Halves of a head -> neighbours: what we rotate as (k, k + K/2) they rotate as (2k, 2k + 1)."""
    heads = x.unflatten(0, (c.num_heads, 2, -1))
    return (heads.transpose(1, 2).flatten(0, 2),)


def _together(parts: Sequence[Tensor], c: Model) -> Tensor:
    heads = parts[0].unflatten(0, (c.num_heads, -1, 2))
    return heads.transpose(1, 2).flatten(0, 2)


def _kernel(x: Tensor, c: Model) -> tuple[Tensor, ...]:
    """Rows over (row, column, channel) of a patch -> a kernel (D, C, 1, p, p); biases stay."""
    return (x if x.ndim == 1 else x.unflatten(1, (1, c.patch, c.patch, -1)).permute(0, 4, 1, 2, 3),)


def _rows(parts: Sequence[Tensor], c: Model) -> Tensor:
    (x,) = parts
    return x if x.ndim == 1 else x.permute(0, 2, 3, 4, 1).flatten(1)


SAME = Form(lambda x, c: (x,), lambda parts, c: parts[0])
BATCHED = Form(lambda x, c: (x[None],), lambda parts, c: parts[0][0])
PAIRS = Form(_apart, _together)
KERNEL_3D = Form(_kernel, _rows)
