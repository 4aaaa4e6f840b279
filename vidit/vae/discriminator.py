"""A 3D PatchGAN: does each patch of a clip look real? (pix2pix, 1611.07004; over time as MAGVIT-v2, 2310.05737.)

Every layer looks at one row alone, so a row's loss does not depend on what else is in its batch, nor on ranks. Time is
padded with zeros, so a video of one frame, an image, has an answer too. What is remembered of steps is in `averages`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidit.config import VaeTrain
from vidit.dtypes import widen
from vidit.vae.convolution import channels_last

JUDGE = "discriminator."
"""What the names of a discriminator's parameters begin with, in the model of a run."""
GROUPS = 8
SLOPE = 0.2  # of the leaky ReLU, as pix2pix has it


class Patches(nn.Module):
    """Convolution of 3x3x3, a group norm over the row where asked for, leaky ReLU."""

    def __init__(self, channels: int, out_channels: int, stride: tuple[int, int, int], normed: bool):
        super().__init__()
        self.conv = nn.Conv3d(channels, out_channels, 3, stride, padding=1)
        self.norm = nn.GroupNorm(GROUPS, out_channels) if normed else None

    def forward(self, x: Tensor) -> Tensor:
        h = convolved(x, self.conv)
        if self.norm is not None:
            h = F.group_norm(widen(h), GROUPS, self.norm.weight, self.norm.bias).to(x.dtype)
        return F.leaky_relu(h, SLOPE)


class Discriminator(nn.Module):
    """(B, 3, T, H, W) in [-1, 1] -> logits (B, 1, T', H', W') in at least fp32, above 0 where it takes it for real.

    averages: (3,), of LeCAM: decayed sums of the mean logits of real clips and of decoded ones, and of their weights.
    """

    averages: Tensor

    def __init__(self, c: VaeTrain):
        super().__init__()
        self.dtype = torch.float32
        width = c.discriminator_channels
        # Neighbouring frames are compared before any is passed over.
        layers = [Patches(3, width, (1, 2, 2), normed=False)]
        for level in range(1, c.discriminator_layers):
            layers.append(Patches(width * 2 ** min(level - 1, 3), width * 2 ** min(level, 3), (2, 2, 2), normed=True))
        wide = width * 2 ** min(c.discriminator_layers - 1, 3)
        layers.append(Patches(wide, wide, (1, 1, 1), normed=True))
        self.layers = nn.Sequential(*layers)
        self.last = nn.Conv3d(wide, 1, 3, padding=1)
        self.register_buffer("averages", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return widen(convolved(self.layers(x.to(self.dtype)), self.last))


def convolved(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """A convolution in the dtype of x."""
    assert conv.bias is not None
    weight, bias = channels_last(conv.weight.to(x.dtype)), conv.bias.to(x.dtype)
    return F.conv3d(channels_last(x), weight, bias, conv.stride, conv.padding)
