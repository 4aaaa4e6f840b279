"""The layers over time, each behind a spatial one, each a residual that is zero in the beginning.

| unet.temporal | output                | paper                                                                       |
|---------------|-----------------------|-----------------------------------------------------------------------------|
| identity      | x + r(x)              | Make-A-Video 2209.14792 (section 3.2), ModelScopeT2V 2308.06571             |
| mixed         | x + (1 - alpha) r(x)  | Align-your-Latents 2304.08818 (section 3.1): alpha x + (1 - alpha) (x + r)  |

Written as a residual the mixture is exactly x where r is 0: a video model made of an image model gives what that gave,
bit for bit. Images, and clips of one frame, pass unchanged, with gradients of zero: ranks that average gradients have
the same ones whatever rows each has.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidit.config import Unet
from vidit.dtypes import wide
from vidit.model.context import PADDING, TextContext
from vidit.model.linear import Linear
from vidit.model.norm import Norm
from vidit.model.unet.attention import EPS, Attention, GatedMlp
from vidit.model.unet.layers import Conv2d, GroupNorm
from vidit.model.windows import Grid

NAME = {"self": "attn", "cross": "cross", "mlp": "mlp"}


class Mix(nn.Module):
    """1 - alpha times a residual, where alpha = sigmoid(logit) is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.empty(1))

    def forward(self, residual: Tensor) -> Tensor:
        return residual * torch.sigmoid(-self.logit).to(residual.dtype)


class TemporalLayer(nn.Module):
    """x (B T, C, H, W) plus the residual over time, which a subclass gives for x as (B, T, C, H, W)."""

    def __init__(self, c: Unet):
        super().__init__()
        self.mix: nn.Module = Mix() if c.temporal == "mixed" else nn.Identity()

    def residual(self, x_BTCHW: Tensor, cond_BD: Tensor, text: TextContext) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, cond_BD: Tensor, text: TextContext, grid: Grid) -> Tensor:
        clips = x.unflatten(0, (-1, grid.frames))
        residual = self.mix(self.residual(clips, cond_BD, text)).flatten(0, 1)
        if grid.frames == 1:
            return x + 0 * residual
        if grid.image_B is not None:
            passes = grid.image_B.repeat_interleave(grid.frames)[:, None, None, None]
            return torch.where(passes, x, x + residual)
        return x + residual


class TemporalConvs(TemporalLayer):
    """norm, SiLU and a convolution over three frames, some times; the diffusion time behind the first of them.

    Norms are over all frames of a clip. A kernel of 3x1x1 is a two-dimensional one of 3x1 over (T, H W).
    """

    def __init__(self, c: Unet, width: int):
        super().__init__(c)
        self.steps = nn.ModuleList()
        for number in range(1, c.temporal_convs + 1):
            name = "conv" if number < c.temporal_convs else "closing"
            conv = Conv2d(width, width, (3, 1))
            self.steps.append(nn.ModuleDict({"norm": GroupNorm(c.norm_groups, width, EPS), name: conv}))
        self.time = Linear(c.cond_width, width) if c.adds_time else None

    def residual(self, x_BTCHW: Tensor, cond_BD: Tensor, text: TextContext) -> Tensor:
        h = x_BTCHW.transpose(1, 2).flatten(3)
        for number, step in enumerate(self.steps):
            norm, conv = cast(nn.ModuleDict, step).values()
            if number == 1 and self.time is not None:
                h = h + self.time(F.silu(cond_BD))[:, :, None, None].to(h.dtype)
            h = conv(F.silu(norm(h)))
        return h.unflatten(3, x_BTCHW.shape[-2:]).transpose(1, 2)


class TemporalAttention(TemporalLayer):
    """The frames of each place attend to each other; what parts there are says `unet.temporal_attention`.

    Places in time are known by sinusoids of the frame's number through an MLP, which every part is given and which
    are not carried on, or by a table of relative places, as long as the longest clip the model is built for.
    """

    def __init__(self, c: Unet, width: int, text_width: int, frames: int):
        super().__init__(c)
        sinusoids = c.has_self_attention and c.temporal_position == "sinusoid"
        self.position = FramePosition(width) if sinusoids else None
        table = frames if c.temporal_position == "bias" else 0
        self.parts = nn.ModuleList()
        for kind in c.temporal_attention:
            if kind == "mlp":
                inner: nn.Module = GatedMlp(width)
            elif kind == "self":
                inner = Attention(c, width, width, table)
            else:
                inner = Attention(c, width, text_width)
            self.parts.append(nn.ModuleDict({"norm": Norm(width, affine=True, eps=EPS), NAME[kind]: inner}))

    def residual(self, x_BTCHW: Tensor, cond_BD: Tensor, text: TextContext) -> Tensor:
        batch, frames, _, height, width = x_BTCHW.shape
        start = x_BTCHW.permute(0, 3, 4, 1, 2).flatten(0, 2)
        asking = start if self.position is None else start + self.position(frames, start.device).to(start.dtype)
        residual = torch.zeros_like(start)
        for part in self.parts:
            assert isinstance(part, nn.ModuleDict)
            inner = part["norm"](asking + residual).to(start.dtype)
            if "mlp" in part:
                out = part["mlp"](inner)
            elif "attn" in part:
                out = part["attn"](inner, inner)
            else:
                assert text.frame_BL is not None, "a U-Net masks the text's padding"
                seen = (text.frame_BL != PADDING)[:, None, None, :]
                out = part["cross"](inner.unflatten(0, (batch, -1)).flatten(1, 2), text.features_BLD, seen)
                out = out.view_as(inner)
            residual = residual + out
        return residual.unflatten(0, (batch, height, width)).permute(0, 3, 4, 1, 2)


class FramePosition(nn.Module):
    """The number of each latent frame: (T, D), sinusoids through an MLP as wide as four of D."""

    def __init__(self, width: int):
        super().__init__()
        self.up, self.out = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, frames: int, device: torch.device) -> Tensor:
        half = self.up.in_features // 2
        number, step = (torch.arange(n, device=device, dtype=wide(self.up.weight.dtype)) for n in (frames, half))
        angle = number[:, None] * torch.exp(-math.log(10_000) * step / half)
        return self.out(F.silu(self.up(torch.cat((angle.cos(), angle.sin()), dim=-1))))
