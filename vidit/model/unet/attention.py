"""Attention of a U-Net: within a frame, to the text, and what follows them.

The transformer of Stable Diffusion (2112.10752, appendix E.2.1): group norm and a projection in, self-attention,
cross-attention, a gated MLP, a projection out, plus the input.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidit.config import Unet
from vidit.model.attention import RelativeBias
from vidit.model.context import PADDING, TextContext, visible
from vidit.model.core import attend
from vidit.model.linear import Linear
from vidit.model.norm import Norm
from vidit.model.unet.layers import GroupNorm
from vidit.model.windows import Grid

EPS = 1e-5
PROJECTION_EPS = 1e-6


class Attention(nn.Module):
    """Queries from x (B, S, D), keys and values from `source` (B, L, E), with `bias_frames` a table of relative places.

    `mask` as `attend` takes it.
    """

    def __init__(self, c: Unet, width: int, source_width: int, bias_frames: int = 0):
        super().__init__()
        self.num_heads, self.backend = c.heads(width), c.attention_backend
        self.query = Linear(width, width, bias=False)
        self.key, self.value = (Linear(source_width, width, bias=False) for _ in range(2))
        self.bias = RelativeBias((bias_frames, 1, 1), self.num_heads) if bias_frames else None
        self.out = Linear(width, width)

    def forward(self, x_BSD: Tensor, source_BLE: Tensor, mask: Tensor | None = None) -> Tensor:
        heads = (self.num_heads, -1)
        q, k, v = (
            layer(x).unflatten(-1, heads)
            for layer, x in ((self.query, x_BSD), (self.key, source_BLE), (self.value, source_BLE))
        )
        if self.bias is not None:
            mask = self.bias(Grid(x_BSD.shape[1], 1, 1))[None].to(x_BSD.dtype)
        return self.out(attend(q, k, v, mask, self.backend).flatten(-2))


class GatedMlp(nn.Module):
    """D -> 4 D -> D, one half of 8 D gated by the GELU of the other (GEGLU, 2002.05202)."""

    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = Linear(width, 8 * width), Linear(4 * width, width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        hidden, gate = self.up(x_BSD).chunk(2, dim=-1)
        return self.down(hidden * F.gelu(gate))


class SpatialAttention(nn.Module):
    """(B T, C, H, W) -> the same: places of a frame attend to each other, then each to the text of its row.

    A row of images holds their captions side by side, each for its own.
    """

    def __init__(self, c: Unet, width: int, text_width: int):
        super().__init__()
        self.norm = GroupNorm(c.norm_groups, width, PROJECTION_EPS)
        self.enter, self.leave = Linear(width, width), Linear(width, width)
        self.attn_norm, self.mlp_norm = (Norm(width, affine=True, eps=EPS) for _ in range(2))
        self.attn = Attention(c, width, width)
        self.cross_norm = Norm(width, affine=True, eps=EPS) if c.cross_attention else None
        self.cross = Attention(c, width, text_width) if c.cross_attention else None
        self.mlp = GatedMlp(width)

    def forward(self, x: Tensor, text: TextContext, grid: Grid) -> Tensor:
        height_width = x.shape[-2:]
        # Contiguous: of a view torch makes another product where weights are frozen, with other roundings.
        h = self.enter(self.norm(x).flatten(2).transpose(1, 2).contiguous())
        inner = self.attn_norm(h).to(x.dtype)
        h = h + self.attn(inner, inner)
        if self.cross is not None and self.cross_norm is not None:
            asking = self.cross_norm(h).to(x.dtype).unflatten(0, (-1, grid.frames)).flatten(1, 2)
            mask = frame_mask(text, grid, h.shape[1])
            h = h + self.cross(asking, text.features_BLD, mask).view_as(h)
        h = h + self.mlp(self.mlp_norm(h).to(x.dtype))
        return x + self.leave(h).transpose(1, 2).unflatten(2, height_width)


def frame_mask(text: TextContext, grid: Grid, places: int) -> Tensor:
    """Which text token each of the `places` of each frame sees: (B, 1, 1 or T places, L) boolean."""
    assert text.frame_BL is not None, "a U-Net masks the text's padding"
    if grid.image_B is None:
        return (text.frame_BL != PADDING)[:, None, None, :]
    frame_S = torch.arange(grid.frames, device=text.frame_BL.device).repeat_interleave(places)
    return visible(text.frame_BL, frame_S)[:, None]
