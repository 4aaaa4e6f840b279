"""The token refiner of HunyuanVideo (2412.03603): features of a causal language model learn to look both ways.

A few blocks of self-attention within the caption, behind its linear embedding, gated by the diffusion time and the mean
of the caption's features. Text is short and whole on every rank, so all of it is the same work everywhere.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidit.config import Model
from vidit.dtypes import widen
from vidit.model.context import PADDING
from vidit.model.core import attend
from vidit.model.flops import REFINER_RATIO
from vidit.model.linear import Linear
from vidit.model.norm import Norm
from vidit.model.vector import TimeEmbed, VectorEmbed


class RefinerBlock(nn.Module):
    """(B, L, D) -> (B, L, D); `sees` is (B, 1, 1 or L, L) or None, the conditioning (B, 1 or L, D) fp32."""

    def __init__(self, c: Model):
        super().__init__()
        self.head_dim = c.width // c.num_heads
        self.attn_norm, self.mlp_norm = (Norm(c.width, affine=True) for _ in range(2))
        self.query, self.key, self.value, self.out = (Linear(c.width, c.width) for _ in range(4))
        hidden = REFINER_RATIO * c.width
        self.up, self.down = Linear(c.width, hidden), Linear(hidden, c.width)
        self.modulation = Linear(c.width, 2 * c.width)

    def forward(self, x_BLD: Tensor, cond_BLD: Tensor, sees: Tensor | None) -> Tensor:
        dtype, heads = x_BLD.dtype, (-1, self.head_dim)
        attn_gate, mlp_gate = self.modulation(F.silu(cond_BLD)).chunk(2, dim=-1)
        inner = self.attn_norm(x_BLD).to(dtype)
        q, k, v = (part(inner).unflatten(-1, heads) for part in (self.query, self.key, self.value))
        x_BLD = x_BLD + (attn_gate * self.out(attend(q, k, v, sees, "sdpa").flatten(-2))).to(dtype)
        inner = self.mlp_norm(x_BLD).to(dtype)
        return x_BLD + (mlp_gate * self.down(F.silu(self.up(inner)))).to(dtype)


class Refiner(nn.Module):
    """Embedded captions (B, L, D) and their raw features (B, L, E) -> (B, L, D).

    `frame_BL` is `TextContext`'s: tokens of one caption of a row see each other; None where padding is seen as well.
    """

    def __init__(self, c: Model, text_width: int):
        super().__init__()
        self.time = TimeEmbed(c.time_frequencies, c.width, c.time_spacing == "closed")
        self.pooled = VectorEmbed(text_width, c.width)
        self.blocks = nn.ModuleDict({str(layer): RefinerBlock(c) for layer in range(c.num_refiner_layers)})

    def forward(self, x_BLD: Tensor, text_BLE: Tensor, time_B: Tensor, frame_BL: Tensor | None, images: bool) -> Tensor:
        """`images`: rows may hold captions side by side."""
        sees = None if frame_BL is None else caption_mask(frame_BL, images)
        cond_BLD = self.time(time_B)[:, None] + self.pooled(caption_mean(widen(text_BLE), sees))
        for block in self.blocks.values():
            x_BLD = block(x_BLD, cond_BLD, None if sees is None else sees[:, None])
        return x_BLD


def caption_mask(frame_BL: Tensor, images: bool) -> Tensor:
    """Which text tokens each of them sees: (B, 1 or L, L) bool."""
    if images:
        return frame_BL[:, :, None] == frame_BL[:, None, :]
    return (frame_BL != PADDING)[:, None, :]


def caption_mean(text_BLE: Tensor, sees: Tensor | None) -> Tensor:
    """The mean of the features that a token sees: (B, 1 or L, E)."""
    if sees is None:
        return text_BLE.mean(1, keepdim=True)
    weight = sees.to(text_BLE.dtype)
    return torch.matmul(weight, text_BLE) / weight.sum(-1, keepdim=True).clamp(min=1)
