"""A single-stream block (FLUX; HunyuanVideo, 2412.03603; ViT-22B's parallel layers, 2302.05442).

Video and text go through one set of weights, and attention and MLP read the same normed tokens side by side: one norm,
one modulation of three vectors, one gate. The two stay `Streams`, so that ranks divide the video's tokens here as
elsewhere. Their common output projection of (D + F) columns is `attn.out` beside `mlp.down`, with one bias, that of
`attn.out`: each half can then be divided by rows with what makes its input.
"""

from torch import Tensor, nn

from vidit.config import AnyWindow, Model
from vidit.model.attention import Positions, TextContext
from vidit.model.block import Mlp
from vidit.model.joint import JointAttention, Streams
from vidit.model.modulation import Modulation
from vidit.model.norm import Norm, modulate
from vidit.model.windows import Grid

VECTORS = 3
"""Shift, scale and gate, the same for both streams."""


class SingleBlock(nn.Module):
    """`Streams` to `Streams`."""

    def __init__(self, c: Model, window: AnyWindow):
        super().__init__()
        self.modulation = Modulation(VECTORS, c.width, c.cond_width, rank=0)
        self.norm = Norm(c.width, c.norm_affine, c.norm_eps)
        self.attn = JointAttention(c, window)
        self.mlp = Mlp(c.width, c.mlp_width, c.activation, bias=False)

    def forward(self, x: Streams, text: TextContext, cond_BRD: Tensor, positions: Positions, grid: Grid) -> Streams:
        dtype = x.video_BSD.dtype
        shift, scale, gate = self.modulation(cond_BRD)
        video, words = (modulate(self.norm(s), shift, scale).to(dtype) for s in x)
        attended = self.attn(video, positions, grid, text._replace(features_BLD=words))
        inner = zip(x, attended, (video, words), strict=True)
        return Streams(*(s + (gate * (found + self.mlp(i))).to(dtype) for s, found, i in inner))
