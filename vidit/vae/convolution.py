"""The 3D convolution in the formulation that is fast for its input; the numbers are the same up to rounding.

On a CPU torch hands a convolution to oneDNN only above a size (more than one row, or more than 20480 numbers in
C x T x H), and its own loop for the rest is up to ten times as slow in fp32. A streamed video is one row of a few
frames: just what falls below. There a convolution with k_t frames is written as a two-dimensional one over all
frames at once, with the k_t frames that it meets as channels, which oneDNN takes. A pointwise one is a matrix product
everywhere: torch 2.13's strided pointwise conv2d in channels_last ends the process in its backward pass on a CPU.
Tensors are in channels_last_3d, where frames are a view: (B, T) folds into one dim without a copy. Measured in
`benchmarks/conv3d.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# aten/src/ATen/native/Convolution.cpp (use_mkldnn): what is not larger goes to the loop where there is one row.
ONEDNN_NUMBERS = 20480


def channels_last(x_BCTHW: Tensor) -> Tensor:
    """x with its channels innermost in memory; itself where they are already."""
    return x_BCTHW.contiguous(memory_format=torch.channels_last_3d)


def conv3d(
    x_BCTHW: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int, int], padding: tuple[int, int]
) -> Tensor:
    """A convolution without padding in time, `padding` zeros around rows and columns. (B, C', T', H', W')."""
    x = channels_last(x_BCTHW)
    if weight.shape[2:] == (1, 1, 1):
        t, h, w = stride
        return F.linear(x[:, :, ::t, ::h, ::w].movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
    if torch.compiler.is_exporting() or not _small(x):
        return F.conv3d(x, channels_last(weight), bias, stride, (0, *padding))
    return _of_stacked_frames(x, weight, bias, stride, padding)


def _small(x: Tensor) -> bool:
    """Whether torch would take its own loop."""
    return (
        x.device.type == "cpu" and x.dtype == torch.float32 and len(x) == 1 and x[0, ..., 0].numel() <= ONEDNN_NUMBERS
    )


def _of_stacked_frames(
    x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int, int], padding: tuple[int, int]
) -> Tensor:
    """One two-dimensional convolution of all frames, whose channels are those of the frames that the kernel meets."""
    rows, frames = len(x), (x.shape[2] - weight.shape[2]) // stride[0] + 1
    met = [x[:, :, k : k + (frames - 1) * stride[0] + 1 : stride[0]] for k in range(weight.shape[2])]
    stacked = torch.cat(met, dim=1).transpose(1, 2).flatten(0, 1)
    out = F.conv2d(stacked, weight.transpose(1, 2).flatten(1, 2), bias, stride[1:], padding)
    return out.unflatten(0, (rows, frames)).transpose(1, 2)
