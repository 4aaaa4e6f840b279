"""What happens before the blocks and after them: patches, time, text, positions, output.

W.A.L.T. (2312.06662, section 3.2): p x p patches of each latent frame; learned absolute positions as the sum
of a space table and a time table, images at time 0; self-conditioning enters by channel concatenation.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidit.config import Model
from vidit.dtypes import widen
from vidit.model.attention import Positions
from vidit.model.block import GELU
from vidit.model.flops import TIME_FREQUENCIES
from vidit.model.linear import Linear
from vidit.model.modulation import output_modulation
from vidit.model.norm import Norm, modulate
from vidit.model.rope import Split, rope_angles
from vidit.model.windows import Grid


class PatchEmbed(nn.Module):
    """(B, C, T, H, W) -> (B, S, D) with S = T H/p W/p.

    With `self_conditioned` the estimate of a first pass takes as many channels again; None is an estimate of zeros.
    """

    def __init__(self, channels: int, patch: int, width: int, self_conditioned: bool = False):
        super().__init__()
        self.patch, self.self_conditioned = patch, self_conditioned
        self.project = Linear(channels * (2 if self_conditioned else 1) * patch * patch, width)

    def forward(self, x_BCTHW: Tensor, previous_BCTHW: Tensor | None = None) -> Tensor:
        if self.self_conditioned:
            previous = torch.zeros_like(x_BCTHW) if previous_BCTHW is None else previous_BCTHW
            x_BCTHW = torch.cat((x_BCTHW, previous), dim=1)
        b, c, t, h, w = x_BCTHW.shape
        p = self.patch
        x = x_BCTHW.reshape(b, c, t, h // p, p, w // p, p).permute(0, 2, 3, 5, 4, 6, 1)
        return self.project(x.reshape(b, t * (h // p) * (w // p), p * p * c))


class TimeEmbed(nn.Module):
    """Sinusoids of the diffusion time (about 0 to 1000) through a two-layer MLP, fp32: (B,) -> (B, D)."""

    def __init__(self, width: int):
        super().__init__()
        self.up = Linear(TIME_FREQUENCIES, width)
        self.out = Linear(width, width)

    def forward(self, time_B: Tensor) -> Tensor:
        half = TIME_FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device=time_B.device)
        angle = widen(time_B)[:, None] * torch.exp(-math.log(10_000) * steps / half)
        return self.out(F.silu(self.up(torch.cat((angle.cos(), angle.sin()), dim=-1))))


class TextEmbed(nn.Module):
    """Text features E -> model width D, two layers."""

    def __init__(self, text_width: int, width: int, activation: str = "gelu"):
        super().__init__()
        self.approximate = GELU[activation]
        self.up = Linear(text_width, width)
        self.out = Linear(width, width)

    def forward(self, text_BLE: Tensor) -> Tensor:
        return self.out(F.gelu(self.up(text_BLE), approximate=self.approximate))


class AbsolutePosition(nn.Module):
    """Learned space and time tables: (S, D). The tables' size is the largest grid the model takes."""

    def __init__(self, grid: tuple[int, int, int], width: int):
        super().__init__()
        self.time = nn.Parameter(torch.empty(grid[0], width))
        self.space = nn.Parameter(torch.empty(grid[1], grid[2], width))

    def forward(self, grid: Grid) -> Tensor:
        largest = (self.time.shape[0], *self.space.shape[:2])
        if any(n > most for n, most in zip(grid.shape, largest, strict=True)):
            raise ValueError(
                f"a grid of {grid.shape} latent tokens exceeds the position tables' {largest}; "
                "sample at most the training size, or train with model.absolute_position=false"
            )
        # Times one: of a grid of one token, autograd would give both tables one tensor as their gradient.
        time = self.time[: grid.frames, None, :] * 1
        space = self.space[: grid.height, : grid.width].reshape(1, grid.height * grid.width, -1)
        table = (time + space).flatten(0, 1)
        if grid.image_B is None:
            return table
        image = (self.time[:1, None, :] + space).expand(grid.frames, -1, -1).flatten(0, 1)
        return torch.where(grid.image_B[:, None, None], image, table)


class TokenPositions(nn.Module):
    """The (t, h, w) place of every token of the grid, and its rotary angles."""

    def __init__(self, head_dim: int, split: Split = "quarter"):
        super().__init__()
        self.head_dim, self.split = head_dim, split

    def forward(self, grid: Grid, device: torch.device) -> Positions:
        axes = torch.meshgrid(*(torch.arange(n, device=device) for n in grid.shape), indexing="ij")
        position_S3 = torch.stack([axis.flatten() for axis in axes], dim=-1)
        return Positions(position_S3, *rope_angles(position_S3, self.head_dim, self.split))


class Head(nn.Module):
    """Tokens back to a latent: modulated norm, linear, un-patchify; fp32 out."""

    def __init__(self, c: Model, channels: int):
        super().__init__()
        self.patch, self.channels = c.patch, channels
        self.norm = Norm(c.width)
        self.modulation = output_modulation(c)
        self.project = Linear(c.width, c.patch * c.patch * channels)

    def forward(self, x_BSD: Tensor, cond_BRD: Tensor, grid: Grid) -> Tensor:
        shift, scale = self.modulation(cond_BRD)
        x = widen(self.project(modulate(self.norm(x_BSD), shift, scale).to(x_BSD.dtype)))
        p = self.patch
        x = x.reshape(x.shape[0], *grid.shape, p, p, self.channels).permute(0, 6, 1, 2, 4, 3, 5)
        return x.reshape(x.shape[0], self.channels, grid.frames, grid.height * p, grid.width * p)
