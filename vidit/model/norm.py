"""The norms of a DiT, in at least fp32 whatever the tokens' dtype.

On tokens a layer norm, bare where a modulation carries scale and shift. On queries and keys (QK-norm, 2302.05442) one
of two kinds: over the head dim, as layer or RMS norm, so that ranks which divide heads need nothing of one another, or
over all heads at once (Wan, 2503.20314), where `mean` is the seam at which such ranks average.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidit.config import Model
from vidit.dtypes import widen

EPS = 1e-6


class Norm(nn.Module):
    """Layer norm over the last dim: (..., D) -> (..., D) in at least fp32; with `affine` its own scale and shift."""

    def __init__(self, width: int, affine: bool = False, eps: float = EPS):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width)) if affine else None
        self.bias = nn.Parameter(torch.empty(width)) if affine else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if p is None else widen(p) for p in (self.weight, self.bias))
        return F.layer_norm(widen(x), x.shape[-1:], weight, bias, self.eps)


def modulate(normed_BSD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """normed (1 + scale) + shift."""
    return torch.addcmul(shift_B1D, normed_BSD, 1 + scale_B1D)


class HeadNorm(nn.Module):
    """Layer norm over the head dim, scale only or `affine`: (B, S, N, K), fp32 inside.

    Returned in at least fp32: the rotation that follows works there too, and one cast is enough.
    """

    def __init__(self, head_dim: int, affine: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_dim))
        self.bias = nn.Parameter(torch.empty(head_dim)) if affine else None

    def forward(self, x_BSNK: Tensor) -> Tensor:
        bias = None if self.bias is None else widen(self.bias)
        return F.layer_norm(widen(x_BSNK), self.weight.shape, widen(self.weight), bias, eps=EPS)


class HeadRms(nn.Module):
    """RMS norm over the head dim, scale only (FLUX, STDiT3): (B, S, N, K), in at least fp32."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_dim))

    def forward(self, x_BSNK: Tensor) -> Tensor:
        return F.rms_norm(widen(x_BSNK), self.weight.shape, widen(self.weight), eps=EPS)


class MeanSquare(nn.Module):
    """Mean of x^2 over the heads and their dims: (B, S, N, K) -> (B, S, 1, 1)."""

    def forward(self, x_BSNK: Tensor) -> Tensor:
        return x_BSNK.square().mean((-2, -1), keepdim=True)


class WidthNorm(nn.Module):
    """RMS norm over all heads, scale only: (B, S, N, K) in at least fp32; `weight` has an entry for each N and K."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.mean = MeanSquare()

    def forward(self, x_BSNK: Tensor) -> Tensor:
        x = widen(x_BSNK)
        scale = widen(self.weight).unflatten(-1, x.shape[-2:])
        return x * torch.rsqrt(self.mean(x) + EPS) * scale


def query_key_norm(c: Model) -> nn.Module:
    """What `model.qk_norm` says, for queries or for keys."""
    if c.qk_norm == "none":
        return nn.Identity()
    if c.qk_norm == "width":
        return WidthNorm(c.width)
    if c.qk_norm == "head_rms":
        return HeadRms(c.width // c.num_heads)
    return HeadNorm(c.width // c.num_heads, affine=c.qk_norm == "head_affine")
