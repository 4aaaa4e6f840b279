"""Convolution and norm of a U-Net, on frames that are folded into the batch: (B T, C, H, W).

As the model's linear layer, both compute in the dtype of their input; the norm is an fp32 island.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidit.dtypes import widen


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` with weights cast to the dtype of its input, padded so that stride 1 keeps the size."""

    def __init__(self, channels: int, out_channels: int, kernel: tuple[int, int] = (3, 3), stride: int = 1):
        super().__init__(channels, out_channels, kernel, stride, padding=(kernel[0] // 2, kernel[1] // 2))

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), self.stride, self.padding)


class GroupNorm(nn.Module):
    """Group norm (1803.08494) over all dims behind the channels, fp32 inside. Keeps shape and dtype."""

    def __init__(self, groups: int, channels: int, eps: float):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight, self.bias = nn.Parameter(torch.empty(channels)), nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        # In channels_last torch 2.13 ends the process in the backward pass of a norm whose input needs no gradient.
        wide = widen(x).contiguous()
        return F.group_norm(wide, self.groups, widen(self.weight), widen(self.bias), self.eps).to(x.dtype)
