"""Where the vectors come from that shift, scale and gate a block: AdaLN in three forms.

| form              | of a block                                   | paper                          |
|-------------------|----------------------------------------------|--------------------------------|
| projected, rank 0 | a projection of c of its own                 | DiT 2212.09748                 |
| projected, rank r | A_1 of the model + W_b W_a c                 | W.A.L.T. 2312.06662, sec. 3.3  |
| table             | A_1 of the model + a table (adaLN-single)    | PixArt-alpha 2310.00426, sec. 2.3 |

With a time for each latent frame (Open-Sora 1.2) there is a row of the conditioning for each of them, (B T, R, D), and
`FrameVectors` gives every token those of its frame. In a packed row there is one for each clip, or each of its frames.

The conditioning (B, R, D), fp32, has c in row 0 and behind it A_1, where the model has one. Each of the video's and, in
a joint model, of the text's stream has six vectors: shift, scale and gate of the attention, then of the MLP.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidit.config import Model
from vidit.model.context import Positions
from vidit.model.linear import Linear
from vidit.model.packed import frame_of
from vidit.model.spread import spread
from vidit.model.windows import Grid


class Modulation(nn.Module):
    """The vectors of a block from a projection of c: conditioning (B, R, D) -> `num` of (B, 1, D), all fp32."""

    def __init__(self, num: int, width: int, cond_width: int, rank: int):
        super().__init__()
        self.num = num
        self.down = Linear(cond_width, rank, bias=False) if rank else None
        self.up = Linear(rank or cond_width, num * width, bias=not rank)

    def forward(self, cond_BRD: Tensor) -> tuple[Tensor, ...]:
        c_BD = F.silu(cond_BRD[:, 0])
        own = self.up(c_BD if self.down is None else self.down(c_BD)).unflatten(-1, (self.num, -1))
        return (own if self.down is None else cond_BRD[:, 1:] + own).unsqueeze(2).unbind(1)


class Table(nn.Module):
    """Learned vectors, added to some rows of the conditioning: (B, R, D) -> `num` of (B, 1, D), fp32."""

    def __init__(self, num: int, width: int, rows: slice):
        super().__init__()
        self.rows = rows
        self.table = nn.Parameter(torch.empty(num, width))

    def forward(self, cond_BRD: Tensor) -> tuple[Tensor, ...]:
        return (cond_BRD[:, self.rows] + self.table).unsqueeze(2).unbind(1)


class OutputModulation(Linear):
    """Shift and scale of the output layer: (B, R, D) -> two of (B, 1, D), fp32."""

    def forward(self, cond_BRD: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return super().forward(F.silu(cond_BRD[:, 0])).unsqueeze(1).chunk(2, dim=-1)


class FrameVectors(nn.Module):
    """Vectors of latent frames, each (B T, 1, D) -> those of the tokens of this rank, each (B, S, D)."""

    def forward(self, vectors: tuple[Tensor, ...], positions: Positions, grid: Grid) -> tuple[Tensor, ...]:
        if grid.clips:
            row_S = frame_of(positions.position_S3, grid)
            return tuple(spread(v.flatten(0, 1), row_S)[None] for v in vectors)
        frame_S = positions.position_S3[:, 0]
        return tuple(spread(v.reshape(-1, grid.frames, v.shape[-1]), frame_S) for v in vectors)


def block_modulation(c: Model) -> nn.Module:
    """What `model.modulation` says, for a block."""
    if c.modulation == "table":
        return Table(c.num_vectors, c.width, slice(1, None))
    return Modulation(c.num_vectors, c.width, c.cond_width, c.adaln_rank)


def output_modulation(c: Model) -> nn.Module:
    """The same for the output layer."""
    return Table(2, c.width, slice(0, 1)) if c.modulation == "table" else OutputModulation(c.cond_width, 2 * c.width)
