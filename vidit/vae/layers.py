"""Causal 3D layers (MAGVIT-v2, 2310.05737, as W.A.L.T. uses it).

Causal means: an output frame depends on no later input frame. Convolutions pad k_t - 1 frames in front, by
repeating the first frame; norms take their statistics at one position. So the first frame is coded alone
and an image is a video of one frame. Like the model's linear layer, a convolution computes in the dtype of
its input.

What the first frame is special for stands in two modules without parameters, `Front` and `DropFirst`; all else
treats every frame alike. In a part of a video that does not begin with its first frame others stand in their
places: with the last `past` frames of what came before in front of it, every layer gives what the whole gives.

Between the layers tensors lie in channels_last_3d: norms and convolutions read a position's channels together.
"""

from typing import cast

import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from vidit.config import Vae
from vidit.dtypes import widen
from vidit.vae.convolution import conv3d, joined
from vidit.vae.norms import added, build_norm, silu


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
    """(B, C, T, H, W) -> (B, C', ceil(T / stride_t), H / stride, W / stride), causal in time.

    `around`: rows and columns of zeros on each side; half the kernel where none are given.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel: int = 3,
        stride: tuple[int, int, int] = (1, 1, 1),
        around: int | None = None,
    ):
        around = kernel // 2 if around is None else around
        super().__init__(channels, out_channels, kernel, stride=stride, padding=(0, around, around))
        if kernel > 1:
            self.front = Front(kernel - 1, past=kernel - stride[0])

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size[0] > 1:
            x = joined((self.front(x), x), dim=2)
        assert self.bias is not None
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        _, *padding = cast(tuple[int, int, int], self.padding)
        return conv3d(x, weight, bias, cast(tuple[int, int, int], self.stride), (padding[0], padding[1]))


class ResBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus the input, which is projected where the width changes."""

    def __init__(self, c: Vae, channels: int, out_channels: int):
        super().__init__()
        self.norm1, self.norm2 = build_norm(c, channels), build_norm(c, out_channels)
        self.conv1, self.conv2 = CausalConv3d(channels, out_channels), CausalConv3d(out_channels, out_channels)
        self.shortcut = CausalConv3d(channels, out_channels, kernel=1) if out_channels != channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h = silu(self.norm2(h))  # by its name, so that what the norm has read is free while the next layer works
        return added(self.conv2(h), x if self.shortcut is None else self.shortcut(x))


class Down(nn.Module):
    """A strided causal convolution plus a shortcut without parameters: space and time to depth, then the mean
    of groups of channels (DC-AE's residual autoencoding, 2410.10733, section 3.2).

    (1 + 2n) frames become (1 + n) where it strides in time: the first frame stands for a pair by itself.
    """

    def __init__(self, channels: int, out_channels: int, space: bool, time: bool):
        super().__init__()
        self.s, self.t, self.out_channels = (2 if space else 1), (2 if time else 1), out_channels
        self.group, rest = divmod(channels * self.t * self.s**2, out_channels)
        assert not rest, f"{channels} channels folded by {self.t}x{self.s}x{self.s} do not divide by {out_channels}"
        self.conv = CausalConv3d(channels, out_channels, stride=(self.t, self.s, self.s))
        self.pair = Front(self.t - 1, past=0)

    def forward(self, x: Tensor) -> Tensor:
        return added(self.conv(x), self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """What is added to the convolution's output."""
        pairs = joined((self.pair(x), x), dim=2) if self.t == 2 else x
        sums = rearrange(widen(pairs), "b c (f t) (h p) (w q) -> b f h w c t p q", t=self.t, p=self.s, q=self.s)
        group = self.group
        for axis in (-1, -2, -3):  # what lies wholly within a group is added where it lies; the rest is copied together
            if (size := sums.shape[axis]) > 1 and group % size == 0:
                sums, group = (sums.select(axis, 0) + sums.select(axis, 1)).unsqueeze(axis), group // size
            elif size > 1:
                break
        depth = sums.flatten(4)
        depth = depth if group == 1 else depth.unflatten(-1, (self.out_channels, -1)).sum(-1)
        return (depth / self.group).to(x.dtype).movedim(-1, 1)


class Up(nn.Module):
    """Depth to space and time, plus a shortcut that repeats channels; the inverse arrangement of `Down`.

    Of the first frame's pair the first is dropped: (1 + n) -> (1 + 2n) frames. The convolution is pointwise:
    the residual blocks that follow mix neighbours, at an eighth of the weights.
    """

    def __init__(self, channels: int, out_channels: int, space: bool, time: bool):
        super().__init__()
        self.s, self.t, self.channels = (2 if space else 1), (2 if time else 1), channels
        self.conv = CausalConv3d(channels, out_channels * self.s**2 * self.t, kernel=1)
        self.drop = DropFirst(self.t - 1)

    def forward(self, x: Tensor) -> Tensor:
        # Each channel of x is added to all that stand at its place in the depth.
        depth = added(self.conv(x).unflatten(1, (self.channels, -1)), x.unsqueeze(2)).flatten(1, 2)
        wide = rearrange(depth, "b (c t p q) f h w -> b (f t) (h p) (w q) c", t=self.t, p=self.s, q=self.s)
        return self.drop(wide.movedim(-1, 1))


class Halve(nn.Module):
    """A strided causal convolution without a shortcut, with zeros behind the last row and column alone, as latent
    diffusion has it (2112.10752); (1 + 2n) frames become (1 + n) where it strides in time.
    """

    def __init__(self, channels: int, space: bool, time: bool):
        super().__init__()
        self.behind = int(space)
        stride = (2 if time else 1, 2 if space else 1, 2 if space else 1)
        self.conv = CausalConv3d(channels, channels, stride=stride, around=int(not space))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(F.pad(x, (0, self.behind, 0, self.behind))))


class Double(nn.Module):
    """Each place twice along rows and columns, each frame but the first along time, then a causal convolution."""

    def __init__(self, channels: int, space: bool, time: bool):
        super().__init__()
        self.s, self.t = (2 if space else 1), (2 if time else 1)
        self.drop = DropFirst(self.t - 1)
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        pattern = "b f h w c -> b (f t) (h p) (w q) c"
        wide = repeat(x.movedim(1, -1), pattern, t=self.t, p=self.s, q=self.s).movedim(-1, 1)
        return cast(Tensor, self.conv(self.drop(wide)))
