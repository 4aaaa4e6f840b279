"""The 3D U-Net: down, across the bottom, and up again, each frame's layers followed by layers over time.

Spatial layers are those of an image model (Stable Diffusion's, 2112.10752), and see one frame each: without its layers
over time the U-Net treats a clip as so many images. It is called as the DiT is, so that training and sampling need not
know which of the two they have. Any number of rows and columns will do: a step down rounds up, a step up makes the
size of what it meets.
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidit.config import Unet
from vidit.dtypes import widen
from vidit.model.context import TextContext
from vidit.model.linear import Linear
from vidit.model.unet.attention import SpatialAttention
from vidit.model.unet.cells import CellShape, cells
from vidit.model.unet.layers import Conv2d, GroupNorm
from vidit.model.unet.residual import EPS, ResBlock
from vidit.model.unet.temporal import TemporalAttention, TemporalConvs
from vidit.model.vector import TimeEmbed
from vidit.model.windows import Grid

# Modules of a U-Net that are checkpointed, compiled and sharded as one, as patterns of names.
UNITS = ("down.*.cells.*", "mid.*", "up.*.cells.*")
# What an image model lacks.
TEMPORAL = "temporal_"


class Cell(nn.Module):
    """A residual block, attention where there is some, and behind each its layer over time: (B T, C, H, W)."""

    def __init__(self, c: Unet, shape: CellShape, text_width: int, frames: int):
        super().__init__()
        over_time, width = c.temporal != "none", shape.width
        self.resnet = ResBlock(shape.channels, width, c.cond_width, c.norm_groups)
        self.temporal_convs = TemporalConvs(c, width) if over_time and c.temporal_convs else None
        self.attention = SpatialAttention(c, width, text_width) if shape.attends else None
        behind = over_time and shape.attends and c.temporal_attention
        self.temporal_attention = TemporalAttention(c, width, text_width, frames) if behind else None

    def forward(self, x: Tensor, cond_BD: Tensor, text: TextContext, grid: Grid) -> Tensor:
        x = self.resnet(x, cond_BD)
        if self.temporal_convs is not None:
            x = self.temporal_convs(x, cond_BD, text, grid)
        if self.attention is not None:
            x = self.attention(x, text, grid)
        if self.temporal_attention is not None:
            x = self.temporal_attention(x, cond_BD, text, grid)
        return x


class Level(nn.Module):
    """The cells of one resolution, and the convolution that leads on to the next, where there is one."""

    def __init__(self, inner: list[Cell], resample: Conv2d | None):
        super().__init__()
        self.cells = nn.ModuleList(inner)
        self.resample = resample


class Head(nn.Module):
    """norm, SiLU, and a convolution that begins at zero, fp32 out."""

    def __init__(self, c: Unet, channels: int):
        super().__init__()
        self.norm = GroupNorm(c.norm_groups, c.channels, EPS)
        self.project = Conv2d(c.channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return widen(self.project(F.silu(self.norm(x))))


class VideoUnet(nn.Module):
    """Denoiser: (x_t, time, text) -> output of the shape of x_t, fp32.

    `channels` is the latent's, `grid` the largest one it is built for, `text_width` the text encoder's. Parameters are
    allocated, not filled: see `vidit.model.init.initialise`.
    """

    def __init__(self, c: Unet, channels: int, grid: tuple[int, int, int], text_width: int):
        super().__init__()
        self.dtype = torch.float32
        self.config, self.channels, self.text_width = c, channels, text_width
        shapes = cells(c)

        def made(own: tuple[CellShape, ...]) -> list[Cell]:
            return [Cell(c, shape, text_width, grid[0]) for shape in own]

        self.time = TimeEmbed(c.channels, c.cond_width)
        self.frame_rate = TimeEmbed(c.channels, c.cond_width) if c.frame_rate else None
        self.pooled = Linear(text_width, c.cond_width) if c.pooled_text else None
        self.first = Conv2d(channels, c.channels)
        steps = [Conv2d(width, width, stride=2) for width in c.widths[:-1]]
        self.down = nn.ModuleList(Level(made(own), step) for own, step in zip(shapes.down, [*steps, None], strict=True))
        self.mid = nn.ModuleList(made(shapes.mid))
        ups = [Conv2d(width, width) for width in c.widths[:0:-1]]
        self.up = nn.ModuleList(Level(made(own), step) for own, step in zip(shapes.up, [*ups, None], strict=True))
        self.head = Head(c, channels)

    def forward(
        self,
        x: Tensor,
        grid: Grid,
        time_B: Tensor,
        text_BLE: Tensor,
        text_frame_BL: Tensor,
        pooled_BE: Tensor | None = None,
        previous_BCTHW: Tensor | None = None,
        second: TextContext | None = None,
    ) -> Tensor:
        """Predict the diffusion target. Arguments are those of `vidit.model.dit.DiT`; there is no self-conditioning,
        and one encoder of text.
        """
        assert previous_BCTHW is None, "a U-Net is not self-conditioned"
        assert second is None, "a U-Net reads one encoder"
        cond_BD = self.time(time_B)
        if self.frame_rate is not None:
            assert grid.fps_B is not None, "unet.frame_rate is set, but the grid has no frames a second"
            cond_BD = cond_BD + self.frame_rate(grid.fps_B)
        if self.pooled is not None:
            assert pooled_BE is not None, "unet.pooled_text is set, but the batch has no pooled text"
            cond_BD = cond_BD + self.pooled(widen(pooled_BE))
        text = TextContext(text_BLE.to(self.dtype), text_frame_BL)
        h = self.first(x.transpose(1, 2).flatten(0, 1).to(self.dtype).contiguous())
        skips = [h]
        for level in cast(Iterable[Level], self.down):
            for cell in level.cells:
                h = cell(h, cond_BD, text, grid)
                skips.append(h)
            if level.resample is not None:
                h = level.resample(h)
                skips.append(h)
        for cell in self.mid:
            h = cell(h, cond_BD, text, grid)
        for level in cast(Iterable[Level], self.up):
            for cell in level.cells:
                h = cell(torch.cat((h, skips.pop()), dim=1), cond_BD, text, grid)
            if level.resample is not None:
                h = level.resample(F.interpolate(h, size=skips[-1].shape[-2:], mode="nearest"))
        return self.head(h).unflatten(0, (-1, grid.frames)).transpose(1, 2)
