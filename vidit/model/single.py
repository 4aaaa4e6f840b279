"""A single-stream block (FLUX; HunyuanVideo, 2412.03603; ViT-22B's parallel layers, 2302.05442).

Video and text go through one set of weights, and attention and MLP read the same normed tokens side by side: one norm,
one modulation of three vectors, one gate. The two stay `Streams`, so that ranks divide the video's tokens here as
elsewhere. Their common output projection of (D + F) columns is `attn.out` beside `mlp.down`, with one bias, that of
`attn.out`: each half can then be divided by rows with what makes its input.
"""

from torch import Tensor, nn

from vidit.config import AnyWindow, Model
from vidit.model.block import Mlp
from vidit.model.context import Positions, TextContext
from vidit.model.joint import JointAttention, Streams
from vidit.model.modulation import Modulation
from vidit.model.norm import Norm, modulate
from vidit.model.packed import of_clips
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
        of_text = self.modulation(cond_BRD)
        own = (of_clips(of_text, positions.position_S3) if grid.clips else of_text, of_text)
        video, words = (modulate(self.norm(s), v[0], v[1]).to(dtype) for s, v in zip(x, own, strict=True))
        attended = self.attn(video, positions, grid, text._replace(features_BLD=words))
        inner = zip(x, attended, (video, words), own, strict=True)
        return Streams(*(s + (v[2] * (found + self.mlp(i))).to(dtype) for s, found, i, v in inner))
