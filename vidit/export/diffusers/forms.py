"""How one tensor of ours lies in another library: other order, other shape, the same numbers.

A form is two functions, each the other's inverse, bit for bit. They work on meta tensors too, so shapes are known
before anything is read.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vidit.config import Model


class Form(NamedTuple):
    """`theirs`: (our tensor, model) -> their tensors; `ours`: the way back."""

    theirs: Callable[[Tensor, Model], tuple[Tensor, ...]]
    ours: Callable[[Sequence[Tensor], Model], Tensor]


def _apart(x: Tensor, c: Model) -> tuple[Tensor, ...]:
    """Halves of a head -> neighbours: what we rotate as (k, k + K/2) they rotate as (2k, 2k + 1)."""
    heads = x.unflatten(0, (-1, 2, c.width // c.num_heads // 2))
    return (heads.transpose(1, 2).flatten(0, 2),)


def _together(parts: Sequence[Tensor], c: Model) -> Tensor:
    heads = parts[0].unflatten(0, (-1, c.width // c.num_heads // 2, 2))
    return heads.transpose(1, 2).flatten(0, 2)


def _kernel_3d(x: Tensor, c: Model) -> tuple[Tensor, ...]:
    """Rows over (row, column, channel) of a patch -> a kernel (D, C, 1, p, p); biases stay."""
    return (x if x.ndim == 1 else _kernel_2d(x, c)[0].unsqueeze(2),)


def _from_3d(parts: Sequence[Tensor], c: Model) -> Tensor:
    return parts[0] if parts[0].ndim == 1 else _from_2d([parts[0].squeeze(2)], c)


def _kernel_2d(x: Tensor, c: Model) -> tuple[Tensor, ...]:
    """The same -> (D, C, p, p)."""
    return (x if x.ndim == 1 else x.unflatten(1, (c.patch, c.patch, -1)).permute(0, 3, 1, 2),)


def _from_2d(parts: Sequence[Tensor], c: Model) -> Tensor:
    return parts[0] if parts[0].ndim == 1 else parts[0].permute(0, 2, 3, 1).flatten(1)


def _channels_first(x: Tensor, c: Model) -> tuple[Tensor, ...]:
    """Output rows (row, column, channel) of a patch -> (channel, row, column)."""
    return (x.unflatten(0, (c.patch**2, -1)).transpose(0, 1).flatten(0, 1),)


def _channels_last(parts: Sequence[Tensor], c: Model) -> Tensor:
    return parts[0].unflatten(0, (-1, c.patch**2)).transpose(0, 1).flatten(0, 1)


def _by_norm(x: Tensor, c: Model) -> tuple[Tensor, ...]:
    """(video, text) x (attention, MLP) x three vectors -> of the attention (video, text), of the MLP the same."""
    vectors = x.unflatten(0, (2, 2, 3 * c.width))
    return vectors[:, 0].flatten(0, 1), vectors[:, 1].flatten(0, 1)


def _by_stream(parts: Sequence[Tensor], c: Model) -> Tensor:
    return torch.stack([x.unflatten(0, (2, 3 * c.width)) for x in parts], dim=1).flatten(0, 2)


SAME = Form(lambda x, c: (x,), lambda parts, c: parts[0])
BATCHED = Form(lambda x, c: (x[None],), lambda parts, c: parts[0][0])
PAIRS = Form(_apart, _together)
KERNEL_3D = Form(_kernel_3d, _from_3d)
KERNEL_2D = Form(_kernel_2d, _from_2d)
CHANNELS_FIRST = Form(_channels_first, _channels_last)
BY_NORM = Form(_by_norm, _by_stream)
