"""The residual block of a U-Net, frame by frame: a frame's output depends on no other frame."""

import torch.nn.functional as F
from torch import Tensor, nn

from vidit.model.linear import Linear
from vidit.model.unet.layers import Conv2d, GroupNorm

EPS = 1e-5


class ResBlock(nn.Module):
    """norm, SiLU, conv, plus the time, norm, SiLU, conv, plus the input: (B T, C, H, W) -> (B T, C', H, W).

    The second convolution begins at zero (ADM, 2105.05233). Where the channels change the input is projected.
    """

    def __init__(self, channels: int, width: int, cond_width: int, groups: int):
        super().__init__()
        self.norm1, self.norm2 = GroupNorm(groups, channels, EPS), GroupNorm(groups, width, EPS)
        self.conv, self.closing = Conv2d(channels, width), Conv2d(width, width)
        self.time = Linear(cond_width, width)
        self.shortcut = Conv2d(channels, width, (1, 1)) if channels != width else nn.Identity()

    def forward(self, x: Tensor, cond_BD: Tensor) -> Tensor:
        h = self.conv(F.silu(self.norm1(x)))
        time = self.time(F.silu(cond_BD)).repeat_interleave(len(x) // len(cond_BD), 0)
        h = h + time[:, :, None, None].to(x.dtype)
        shortcut: Tensor = self.shortcut(x)
        return shortcut + self.closing(F.silu(self.norm2(h)))
