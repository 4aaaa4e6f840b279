"""One transformer block: modulated self-attention, cross-attention to text, modulated MLP.

Every family of the project is this block with other parts, chosen by the config: which modulation, which norms, which
attention reads the text, whether text tokens have weights of their own, whether attention through time follows
(GenTron). Blocks in which attention and MLP stand side by side are another class (`single.py`).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from vidit.config import AnyWindow, Model
from vidit.model.attention import CrossAttention, SelfAttention
from vidit.model.context import Positions, TextContext
from vidit.model.joint import Streams, joint_attention
from vidit.model.linear import Linear
from vidit.model.modulation import FrameVectors, block_modulation
from vidit.model.norm import Norm, modulate
from vidit.model.packed import of_clips
from vidit.model.position import TimePosition
from vidit.model.windows import Grid

Tokens = Tensor | Streams
"""Of the video alone (B, S, D), or with the text's."""

# F.gelu's names. On a CPU the tanh approximation takes two and a half times as long.
GELU = {"gelu": "none", "gelu_tanh": "tanh"}


class Mlp(nn.Module):
    """D -> F -> D with a GELU, exact or by tanh; `bias` of the output."""

    def __init__(self, width: int, hidden: int, activation: str, bias: bool = True):
        super().__init__()
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width, bias=bias)
        self.approximate = GELU[activation]

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BSD), approximate=self.approximate))


class Block(nn.Module):
    """(B, S, D) -> (B, S, D), or `Streams` to `Streams` where text tokens take part in self-attention.

    `cross` says whether the block attends to text, `identity_images` whether images pass its attention
    unchanged, `adds_time` whether sinusoids of time come first; `reads_second` and `text_width`, which text it is.
    """

    def __init__(
        self,
        c: Model,
        window: AnyWindow,
        cross: bool,
        identity_images: bool,
        adds_time: bool,
        reads_second: bool = False,
        text_width: int = 0,
    ):
        super().__init__()
        self.reads_second = reads_second
        self.time = TimePosition(c.width, c.position_scale) if adds_time else None
        self.modulation = block_modulation(c)
        self.frames = FrameVectors() if c.frame_times else None
        self.attn_norm = Norm(c.width, c.norm_affine, c.norm_eps)
        self.mlp_norm = Norm(c.width, c.norm_affine, c.mlp_norm_eps or c.norm_eps)
        self.attn = joint_attention(c, window) if c.is_joint else SelfAttention(c, window, identity_images)
        bare = c.cross_norm == "bare"
        self.cross_norm = Norm(c.width, not bare, c.norm_eps) if cross and c.cross_norm != "none" else None
        self.cross = CrossAttention(c, window, text_width) if cross else None
        self.temporal_norm = Norm(c.width, c.norm_affine, c.norm_eps) if c.temporal_attention else None
        self.temporal = SelfAttention(c, (0, 1, 1), identity_images=False) if c.temporal_attention else None
        self.mlp = Mlp(c.width, c.mlp_width, c.activation)
        self.text_mlp = Mlp(c.width, c.mlp_width, c.activation) if c.text_weights == "own" else None

    def forward(self, x: Tokens, text: TextContext, cond_BRD: Tensor, positions: Positions, grid: Grid) -> Tokens:
        streams = as_streams(x)
        dtype, vectors = streams[0].dtype, self.modulation(cond_BRD)
        if self.frames is not None:
            vectors = self.frames(vectors, positions, grid)
        if self.time is not None:
            streams[0] = streams[0] + self.time(positions, grid).to(dtype)
        # Of each stream shift, scale and gate of the attention, then of the MLP.
        own = [vectors[first : first + 6] for first in range(0, len(vectors), 6)]
        if grid.clips and self.frames is None:  # text has a row for each clip, the video one for all of them
            own[0] = of_clips(own[0], positions.position_S3)

        inner = [modulate(self.attn_norm(s), v[0], v[1]).to(dtype) for s, v in zip(streams, own, strict=True)]
        words = [text._replace(features_BLD=x_BLD) for x_BLD in inner[1:]]
        attended = as_streams(self.attn(inner[0], positions, grid, *words))
        streams = [s + (v[2] * out).to(dtype) for s, v, out in zip(streams, own, attended, strict=True)]
        if self.cross is not None:
            (video,) = streams
            asking = video if self.cross_norm is None else self.cross_norm(video).to(dtype)
            said = text.second if self.reads_second else text
            streams = [video + self.cross(asking, said, positions, grid)]
        if self.temporal is not None and self.temporal_norm is not None:
            (video,) = streams
            streams = [video + self.temporal(self.temporal_norm(video).to(dtype), positions, grid.through_time)]
        inner = [modulate(self.mlp_norm(s), v[3], v[4]).to(dtype) for s, v in zip(streams, own, strict=True)]
        mlps = (self.mlp, self.mlp if self.text_mlp is None else self.text_mlp)[: len(streams)]
        streams = [s + (v[5] * mlp(i)).to(dtype) for s, v, i, mlp in zip(streams, own, inner, mlps, strict=True)]
        return streams[0] if len(streams) == 1 else Streams(*streams)


def as_streams(x: Tokens) -> list[Tensor]:
    """The video's tokens, and the text's where they are a stream of their own."""
    return [x] if isinstance(x, Tensor) else list(x)
