"""One transformer block: modulated self-attention, cross-attention to text, modulated MLP.

Every family of the project is this block with other parts, chosen by the config: which modulation, which norms, which
attention reads the text.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from vidit.config import Model
from vidit.model.attention import CrossAttention, Positions, SelfAttention, TextContext
from vidit.model.linear import Linear
from vidit.model.modulation import block_modulation
from vidit.model.norm import Norm, modulate
from vidit.model.windows import Grid

# F.gelu's names. On a CPU the tanh approximation takes two and a half times as long.
GELU = {"gelu": "none", "gelu_tanh": "tanh"}


class Mlp(nn.Module):
    """D -> F -> D with a GELU, exact or by tanh."""

    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)
        self.approximate = GELU[activation]

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BSD), approximate=self.approximate))


class Block(nn.Module):
    """(B, S, D) -> (B, S, D).

    `cross` says whether the block attends to text, `identity_images` whether images pass its attention
    unchanged.
    """

    def __init__(self, c: Model, window: tuple[int, int, int], cross: bool, identity_images: bool):
        super().__init__()
        self.modulation = block_modulation(c)
        self.attn_norm, self.mlp_norm = Norm(c.width), Norm(c.width)
        self.attn = SelfAttention(c, window, identity_images)
        self.cross_norm = Norm(c.width, c.cross_norm == "affine") if cross and c.cross_norm != "none" else None
        self.cross = CrossAttention(c, window) if cross else None
        self.mlp = Mlp(c.width, c.mlp_width, c.activation)

    def forward(self, x_BSD: Tensor, text: TextContext, cond_BRD: Tensor, positions: Positions, grid: Grid) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.modulation(cond_BRD)
        dtype = x_BSD.dtype
        inner = modulate(self.attn_norm(x_BSD), shift_attn, scale_attn).to(dtype)
        x = x_BSD + (gate_attn * self.attn(inner, positions, grid)).to(dtype)
        if self.cross is not None:
            inner = x if self.cross_norm is None else self.cross_norm(x).to(dtype)
            x = x + self.cross(inner, text, positions, grid)
        inner = modulate(self.mlp_norm(x), shift_mlp, scale_mlp).to(dtype)
        return x + (gate_mlp * self.mlp(inner)).to(dtype)
