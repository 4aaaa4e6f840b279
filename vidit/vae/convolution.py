"""The 3D convolution in the formulation that is fast for its input; the numbers are the same up to rounding.

On a CPU torch hands a convolution to oneDNN only above a size (more than one row, or more than 20480 numbers in
C x T x H), and its own loop for the rest is up to ten times as slow in fp32. A streamed video is one row of a few
frames: just what falls below. There a convolution with k_t frames is written as a two-dimensional one over all
frames at once, with the k_t frames that it meets as channels, which oneDNN takes.

Where fp32 is computed without a backward pass, frames of a certain size are made in pairs by Winograd's F(2, 3) along
time (1509.09308, section 4.1): four two-dimensional convolutions of sums and differences of frames instead of six, and
no frame stands three times in memory. An output depends on the frames that it always did. Rounding is about that of
stacked frames, which is up to six times that of torch's loop (1.5e-6 at 256 channels), but relative to the largest of
the three taps.

With a backward pass pairs were no faster below 64 channels (0.78 to 1.22 of the time of what is taken) and hold the
sums of frames as well.

A pointwise convolution is a matrix product everywhere: torch 2.13's strided pointwise conv2d in channels_last ends the
process in its backward pass on a CPU. Tensors are in channels_last_3d, where frames are a view: (B, T) folds into one
dim without a copy. Measured in `benchmarks/conv3d.py`.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# aten/src/ATen/native/Convolution.cpp (use_mkldnn): what is not larger goes to the loop where there is one row.
ONEDNN_NUMBERS = 20480


def channels_last(x_BCTHW: Tensor) -> Tensor:
    """x with its channels innermost in memory; itself where they are already."""
    return x_BCTHW.contiguous(memory_format=torch.channels_last_3d)


def joined(parts: Sequence[Tensor], dim: Literal[1, 2]) -> Tensor:
    """Clips side by side, along channels (1) or frames (2), in channels_last_3d.

    `torch.cat` does not see that the channels of single frames lie innermost, nor those of a frame that is repeated.
    """
    return torch.cat([part.movedim(1, -1) for part in parts], dim=-1 if dim == 1 else 1).movedim(-1, 1)


def frames_of(x_BCTHW: Tensor) -> Tensor:
    """The frames of all clips, (B T, C, H, W), a view of channels_last_3d as channels_last.

    Also of a single frame: with the strides of (1, T) folded as they are torch would not see its format.
    """
    last = x_BCTHW.movedim(1, -1)
    return last.reshape(-1, *last.shape[2:]).permute(0, 3, 1, 2)


def conv3d(
    x_BCTHW: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int, int], padding: tuple[int, int]
) -> Tensor:
    """A convolution without padding in time, `padding` zeros around rows and columns. (B, C', T', H', W')."""
    x = channels_last(x_BCTHW)
    if weight.shape[2:] == (1, 1, 1):
        t, h, w = stride
        return F.linear(x[:, :, ::t, ::h, ::w].movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
    if torch.compiler.is_exporting() or x.device.type != "cpu" or x.dtype != torch.float32:
        return F.conv3d(x, channels_last(weight), bias, stride, (0, *padding))
    if weight.shape[2] == 3 and stride[0] == 1 and _pairs_pay(x) and not torch.is_grad_enabled():
        return _in_pairs(x, weight, bias, stride[1:], padding)
    if len(x) == 1 and x[0, ..., 0].numel() <= ONEDNN_NUMBERS:
        return _of_stacked_frames(x, weight, bias, stride, padding)
    return F.conv3d(x, channels_last(weight), bias, stride, (0, *padding))


def _pairs_pay(x: Tensor) -> bool:
    """Whether pairs take less time: where work outweighs the sums of frames, and no pair stands beside a single frame.

    Of 282 sizes, 3 to 256 channels, 8 to 128 rows, 4 to 10 frames and 1 to 4 clips, pairs took 0.68 to 1.05 of the time
    where this holds, and up to 5.9 times as long where it does not.
    """
    frames, numbers = x.shape[2] - 2, x.shape[1] * x.shape[3]
    return (
        x.shape[1] >= 16 and frames > 1 and frames != 3 and numbers >= 1024 and len(x) * (frames // 2) * numbers >= 2048
    )


def _in_pairs(x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Of four frames x0 .. x3 and taps g0 .. g2 the two frames m0 + m1 + m2 and m1 - m2 - m3, where m0 = (x0 - x2) g0,
    m1 = (x1 + x2) (g0 + g1 + g2) / 2, m2 = (x2 - x1) (g0 - g1 + g2) / 2 and m3 = (x1 - x3) g2.
    """
    rows, frames = len(x), x.shape[2] - 2
    pairs = frames // 2
    even, odd = x[:, :, 0 : 2 * pairs + 1 : 2], x[:, :, 1 : 2 * pairs + 2 : 2]
    first, middle, last = weight.unbind(2)
    mean, half = (first + last) / 2, middle / 2

    def taken(frames_BCPHW: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        flat = F.conv2d(frames_of(frames_BCPHW), kernel, bias, stride, padding)
        return flat.permute(0, 2, 3, 1).unflatten(0, (rows, pairs))

    m1 = taken(odd[:, :, :-1] + even[:, :, 1:], mean + half, bias)
    m2 = taken(even[:, :, 1:] - odd[:, :, :-1], mean - half)
    out = m1.new_empty(rows, frames, *m1.shape[2:])
    ahead, behind = out[:, 0 : 2 * pairs : 2].copy_(m1), out[:, 1 : 2 * pairs : 2].copy_(m1)
    ahead += m2
    behind -= m2
    del m1, m2
    ahead += taken(even[:, :, :-1] - even[:, :, 1:], first)
    behind -= taken(odd[:, :, :-1] - odd[:, :, 1:], last)
    if frames % 2:
        out[:, -1:] = _of_stacked_frames(x[:, :, -3:], weight, bias, (1, *stride), padding).movedim(1, -1)
    return out.movedim(-1, 1)


def _of_stacked_frames(
    x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int, int], padding: tuple[int, int]
) -> Tensor:
    """One two-dimensional convolution of all frames, whose channels are those of the frames that the kernel meets."""
    rows, frames = len(x), (x.shape[2] - weight.shape[2]) // stride[0] + 1
    met = [x[:, :, k : k + (frames - 1) * stride[0] + 1 : stride[0]] for k in range(weight.shape[2])]
    out = F.conv2d(frames_of(joined(met, dim=1)), weight.transpose(1, 2).flatten(1, 2), bias, stride[1:], padding)
    return out.unflatten(0, (rows, frames)).transpose(1, 2)
