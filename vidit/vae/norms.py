"""The norms of the VAE. Their statistics reach over no other frame, so a later one changes no earlier one.

| vae.norm | statistics over                     | so that                                                      |
|----------|-------------------------------------|--------------------------------------------------------------|
| rms      | the channels of one position        | chunks of frames, tiles and rows give what the whole gives   |
| group    | a group of channels, in one frame   | chunks of frames do; a tile or a part of the rows does not   |

A group norm over all frames, as 3D U-Nets have it, would let the last frame change the first latent.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidit.config import Vae
from vidit.dtypes import wide, widen
from vidit.vae.convolution import channels_last, frames_of

EPS = 1e-6


class ChannelNorm(nn.Module):
    """RMS norm over the channels of each position, fp32 inside (as Wan 2.1's VAE). Keeps shape and dtype."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        last = channels_last(x).movedim(1, -1)
        # The norm of a vector is one pass over x, without a copy of its squares or of itself in fp32.
        length = torch.linalg.vector_norm(last, dim=-1, keepdim=True, dtype=wide(x.dtype))
        scale = (length.square() / last.shape[-1] + EPS).rsqrt()
        return scaled(last * scale, self.weight).to(x.dtype).movedim(-1, 1)


class FrameNorm(nn.Module):
    """Group norm (1803.08494) whose statistics are of one frame, fp32 inside. Keeps shape and dtype."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.groups = groups
        self.weight, self.bias = nn.Parameter(torch.empty(channels)), nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        frames = frames_of(widen(channels_last(x)))
        normed = F.group_norm(frames, self.groups, self.weight, self.bias, EPS)
        return normed.unflatten(0, (len(x), -1)).transpose(1, 2).to(x.dtype)


def scaled(x: Tensor, weight: Tensor) -> Tensor:
    """x times weight, in the memory of x where no backward pass needs it."""
    return x * weight if torch.is_grad_enabled() else x.mul_(weight)


def added(x: Tensor, y: Tensor) -> Tensor:
    """x plus y, in the memory of x where no backward pass needs it."""
    return x + y if torch.is_grad_enabled() else x.add_(y)


def silu(x: Tensor) -> Tensor:
    """SiLU of x, in its memory where no backward pass needs it."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def build_norm(c: Vae, channels: int) -> nn.Module:
    """The norm that a config asks for."""
    return FrameNorm(channels, c.norm_groups) if c.norm == "group" else ChannelNorm(channels)
