"""Causal 3D layers (MAGVIT-v2, 2310.05737, as W.A.L.T. uses it).

Causal means: an output frame depends on no later input frame. Convolutions pad k_t - 1 frames in front, by
repeating the first frame; norms take their statistics at one position. So the first frame is coded alone
and an image is a video of one frame. Like the model's linear layer, a convolution computes in the dtype of
its input.

What the first frame is special for stands in two modules without parameters, `Front` and `DropFirst`; all else
treats every frame alike. In a part of a video that does not begin with its first frame others stand in their
places: with the last `past` frames of what came before in front of it, every layer gives what the whole gives.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vidit.dtypes import widen


class Front(nn.Module):
    """The frames that go in front of x: its first one, repeated. (B, C, T, H, W) -> (B, C, repeats, H, W).

    `past`: how many frames of what came before a later part takes in their place, (B, C, past, H, W).
    """

    def __init__(self, repeats: int, past: int):
        super().__init__()
        self.repeats, self.past = repeats, past

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :1].expand(-1, -1, self.repeats, -1, -1)


class DropFirst(nn.Module):
    """Drops `count` frames in front: (B, C, T, H, W) -> (B, C, T - count, H, W). A later part keeps all of its."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, self.count :]


class CausalConv3d(nn.Conv3d):
    """(B, C, T, H, W) -> (B, C', ceil(T / stride_t), H / stride, W / stride), causal in time."""

    def __init__(self, channels: int, out_channels: int, kernel: int = 3, stride: tuple[int, int, int] = (1, 1, 1)):
        super().__init__(channels, out_channels, kernel, stride=stride, padding=(0, kernel // 2, kernel // 2))
        if kernel > 1:
            self.front = Front(kernel - 1, past=kernel - stride[0])

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size[0] > 1:
            x = torch.cat((self.front(x), x), dim=2)
        assert self.bias is not None
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.conv3d(x, weight, bias, self.stride, self.padding)


class ChannelNorm(nn.Module):
    """RMS norm over the channels of each position, fp32 inside (as Wan 2.1's VAE).

    Statistics reach over neither time nor space, so a later frame cannot change an earlier one, and chunks
    and tiles give what the whole video gives.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        scale = torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-6)
        return (wide * scale * self.weight.view(-1, 1, 1, 1)).to(x.dtype)


class ResBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.conv1, self.conv2 = CausalConv3d(channels, channels), CausalConv3d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Down(nn.Module):
    """A strided causal convolution plus a shortcut without parameters: space and time to depth, then the mean
    of groups of channels (DC-AE's residual autoencoding, 2410.10733, section 3.2).

    (1 + 2n) frames become (1 + n) where it strides in time: the first frame stands for a pair by itself.
    """

    def __init__(self, channels: int, out_channels: int, space: bool, time: bool):
        super().__init__()
        self.s, self.t, self.out_channels = (2 if space else 1), (2 if time else 1), out_channels
        self.conv = CausalConv3d(channels, out_channels, stride=(self.t, self.s, self.s))
        self.pair = Front(self.t - 1, past=0)

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.cat((self.pair(x), x), dim=2) if self.t == 2 else x
        depth = rearrange(pairs, "b c (f t) (h p) (w q) -> b (c t p q) f h w", t=self.t, p=self.s, q=self.s)
        return self.conv(x) + depth.unflatten(1, (self.out_channels, -1)).mean(2)


class Up(nn.Module):
    """Depth to space and time, plus a shortcut that repeats channels; the inverse arrangement of `Down`.

    Of the first frame's pair the first is dropped: (1 + n) -> (1 + 2n) frames. The convolution is pointwise:
    the residual blocks that follow mix neighbours, at an eighth of the weights.
    """

    def __init__(self, channels: int, out_channels: int, space: bool, time: bool):
        super().__init__()
        self.s, self.t = (2 if space else 1), (2 if time else 1)
        depth = out_channels * self.s**2 * self.t
        self.repeats = depth // channels
        self.conv = CausalConv3d(channels, depth, kernel=1)
        self.drop = DropFirst(self.t - 1)

    def forward(self, x: Tensor) -> Tensor:
        depth = self.conv(x) + x.repeat_interleave(self.repeats, dim=1)
        x = rearrange(depth, "b (c t p q) f h w -> b c (f t) (h p) (w q)", t=self.t, p=self.s, q=self.s)
        return self.drop(x)


def fold_pixels(x: Tensor, patch: int) -> Tensor:
    """(B, C, T, H, W) -> (B, C p p, T, H/p, W/p)."""
    return rearrange(x, "b c t (h p) (w q) -> b (c p q) t h w", p=patch, q=patch) if patch > 1 else x


def unfold_pixels(x: Tensor, patch: int) -> Tensor:
    """The inverse of `fold_pixels`."""
    return rearrange(x, "b (c p q) t h w -> b c t (h p) (w q)", p=patch, q=patch) if patch > 1 else x
