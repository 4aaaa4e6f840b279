"""One transformer block: modulated self-attention, cross-attention to text, modulated MLP.

AdaLN-Zero as in DiT (2212.09748); AdaLN-LoRA as in W.A.L.T. (2312.06662, section 3.3): one modulation A_1
for the whole model, and in each block A_i = A_1 + W_b W_a c of rank r.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidit.config import Model
from vidit.dtypes import widen
from vidit.model.attention import CrossAttention, Positions, SelfAttention, TextContext
from vidit.model.linear import Linear
from vidit.model.windows import Grid


def norm(x_BSD: Tensor) -> Tensor:
    """Layer norm without parameters, in at least fp32: the modulation carries scale and shift."""
    return F.layer_norm(widen(x_BSD), x_BSD.shape[-1:], eps=1e-6)


def modulate(x_BSD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """norm(x) (1 + scale) + shift, in fp32, returned in the dtype of x."""
    return torch.addcmul(shift_B1D, norm(x_BSD), 1 + scale_B1D).to(x_BSD.dtype)


class Modulation(nn.Module):
    """The six vectors of a block: conditioning (B, 7, D) -> six of (B, 1, D), all fp32.

    Row 0 of the conditioning is c; rows 1-6 are A_1, the modulation that all blocks share (zeros for rank 0).
    """

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.down = Linear(width, rank, bias=False) if rank else None
        self.up = Linear(rank or width, 6 * width, bias=not rank)

    def forward(self, cond_B7D: Tensor) -> tuple[Tensor, ...]:
        c_BD = F.silu(cond_B7D[:, 0])
        own = self.up(c_BD if self.down is None else self.down(c_BD))
        return (cond_B7D[:, 1:] + own.unflatten(-1, (6, -1))).unsqueeze(2).unbind(1)


class Mlp(nn.Module):
    """D -> F -> D with an exact GELU: on a CPU the tanh approximation takes two and a half times as long."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BSD)))


class Block(nn.Module):
    """(B, S, D) -> (B, S, D).

    `cross` says whether the block attends to text, `identity_images` whether images pass its attention
    unchanged.
    """

    def __init__(self, c: Model, window: tuple[int, int, int], cross: bool, identity_images: bool):
        super().__init__()
        self.modulation = Modulation(c.width, c.adaln_rank)
        self.attn = SelfAttention(c, window, identity_images)
        self.cross = CrossAttention(c, window) if cross else None
        self.mlp = Mlp(c.width, c.mlp_width)

    def forward(self, x_BSD: Tensor, text: TextContext, cond_B7D: Tensor, positions: Positions, grid: Grid) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.modulation(cond_B7D)
        dtype = x_BSD.dtype
        x = x_BSD + (gate_attn * self.attn(modulate(x_BSD, shift_attn, scale_attn), positions, grid)).to(dtype)
        if self.cross is not None:
            x = x + self.cross(norm(x).to(dtype), text, positions, grid)
        return x + (gate_mlp * self.mlp(modulate(x, shift_mlp, scale_mlp))).to(dtype)
