"""Vectors of a row: numbers and pooled captions through two layers, fp32."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidit.dtypes import widen
from vidit.model.linear import Linear


class VectorEmbed(nn.Module):
    """Two layers with a SiLU: (..., E) -> (..., D)."""

    def __init__(self, inner: int, width: int):
        super().__init__()
        self.up = Linear(inner, width)
        self.out = Linear(width, width)

    def forward(self, x_BE: Tensor) -> Tensor:
        out: Tensor = self.out(F.silu(self.up(x_BE)))
        return out


class TimeEmbed(VectorEmbed):
    """Sinusoids of the diffusion time (about 0 to 1000), or of a frame rate, through a two-layer MLP, fp32.

    (B,) -> (B, D). Frequencies fall evenly in their logarithm from 1 to 1 / 10000, which is
    among them only if `closed`.
    """

    def __init__(self, inner: int, width: int, closed: bool = False):
        super().__init__(inner, width)
        self.closed = closed

    def forward(self, time_B: Tensor) -> Tensor:
        half = self.up.in_features // 2
        steps = torch.arange(half, dtype=torch.float32, device=time_B.device)
        angle = widen(time_B)[:, None] * torch.exp(-math.log(10_000) * steps / (half - self.closed))
        return super().forward(torch.cat((angle.cos(), angle.sin()), dim=-1))
