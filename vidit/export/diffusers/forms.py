"""How one tensor of ours lies in another library: other order, other shape, the same numbers.

A form is two functions, each the other's inverse, bit for bit. They work on meta tensors too, so shapes are known
before anything is read. Where several tensors of ours lie in one of theirs, each form takes its own part out of it, and
the parts beside each other in dim 1, by `part`, are the whole.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vidit.config import Model


class Form(NamedTuple):
    """`theirs`: (our tensor, model) -> their tensors; `ours`: the way back; `part`: which of those that share one."""

    theirs: Callable[[Tensor, Model], tuple[Tensor, ...]]
    ours: Callable[[Sequence[Tensor], Model], Tensor]
    part: int = 0


def _apart(x: Tensor, c: Model) -> tuple[Tensor, ...]:
    """Halves of a head -> neighbours: what we rotate as (k, k + K/2) they rotate as (2k, 2k + 1)."""
    heads = x.unflatten(0, (-1, 2, c.width // c.num_heads // 2))
    return (heads.transpose(1, 2).flatten(0, 2),)


def _together(parts: Sequence[Tensor], c: Model) -> Tensor:
    heads = parts[0].unflatten(0, (-1, c.width // c.num_heads // 2, 2))
    return heads.transpose(1, 2).flatten(0, 2)


def _kernel_3d(x: Tensor, c: Model) -> tuple[Tensor, ...]:
    """Input (frame, row, column, channel) of a patch -> a kernel (D, C, t, h, w); biases stay."""
    return (x if x.ndim == 1 else x.unflatten(1, (*c.patch, -1)).permute(0, 4, 1, 2, 3),)


def _from_3d(parts: Sequence[Tensor], c: Model) -> Tensor:
    return parts[0] if parts[0].ndim == 1 else parts[0].permute(0, 2, 3, 4, 1).flatten(1)


def _kernel_2d(x: Tensor, c: Model) -> tuple[Tensor, ...]:
    """The same of a patch of one frame -> (D, C, h, w)."""
    return (x if x.ndim == 1 else _kernel_3d(x, c)[0].squeeze(2),)


def _from_2d(parts: Sequence[Tensor], c: Model) -> Tensor:
    return parts[0] if parts[0].ndim == 1 else _from_3d([parts[0].unsqueeze(2)], c)


def _kernel_or_flat(x: Tensor, c: Model) -> tuple[Tensor, ...]:
    """Of one frame -> (D, C, h, w); of several, where theirs is a matrix -> (D, C t h w)."""
    return _kernel_2d(x, c) if c.patch[0] == 1 or x.ndim == 1 else (_kernel_3d(x, c)[0].flatten(1),)


def _from_either(parts: Sequence[Tensor], c: Model) -> Tensor:
    if c.patch[0] == 1 or parts[0].ndim == 1:
        return _from_2d(parts, c)
    return _from_3d([parts[0].unflatten(1, (-1, *c.patch))], c)


def _channels_first(x: Tensor, c: Model) -> tuple[Tensor, ...]:
    """Output (frame, row, column, channel) of a patch -> (channel, frame, row, column)."""
    return (x.unflatten(0, (c.patch_size, -1)).transpose(0, 1).flatten(0, 1),)


def _channels_last(parts: Sequence[Tensor], c: Model) -> Tensor:
    return parts[0].unflatten(0, (-1, c.patch_size)).transpose(0, 1).flatten(0, 1)


def _by_norm(x: Tensor, c: Model) -> tuple[Tensor, ...]:
    """(video, text) x (attention, MLP) x three vectors -> of the attention (video, text), of the MLP the same."""
    vectors = x.unflatten(0, (2, 2, 3 * c.width))
    return vectors[:, 0].flatten(0, 1), vectors[:, 1].flatten(0, 1)


def _by_stream(parts: Sequence[Tensor], c: Model) -> Tensor:
    return torch.stack([x.unflatten(0, (2, 3 * c.width)) for x in parts], dim=1).flatten(0, 2)


def _halves_swapped(x: Tensor, c: Model) -> tuple[Tensor, ...]:
    """Shift, scale -> scale, shift, and the same way back."""
    return (torch.cat(x.chunk(2)[::-1]),)


SAME = Form(lambda x, c: (x,), lambda parts, c: parts[0])
BATCHED = Form(lambda x, c: (x[None],), lambda parts, c: parts[0][0])
PAIRS = Form(_apart, _together)
KERNEL_3D = Form(_kernel_3d, _from_3d)
KERNEL_2D = Form(_kernel_2d, _from_2d)
KERNEL_OR_FLAT = Form(_kernel_or_flat, _from_either)
CHANNELS_FIRST = Form(_channels_first, _channels_last)
BY_NORM = Form(_by_norm, _by_stream)
STREAMS = Form(lambda x, c: x.chunk(2), lambda parts, c: torch.cat(list(parts)))
SCALE_FIRST = Form(_halves_swapped, lambda parts, c: _halves_swapped(parts[0], c)[0])
# The two that read (attention, MLP) of a single-stream block's output.
FIRST_COLUMNS = Form(lambda x, c: (x,), lambda parts, c: parts[0][:, : c.width])
LAST_COLUMNS = Form(lambda x, c: (x,), lambda parts, c: parts[0][:, c.width :], part=1)
