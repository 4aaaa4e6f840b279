"""What happens before the blocks and after them: patches, time, text, output.

W.A.L.T. (2312.06662, section 3.2): p x p patches of each latent frame, or of several; self-conditioning enters by
channel concatenation.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidit.config import Model
from vidit.dtypes import widen
from vidit.model.block import GELU, Tokens, as_streams
from vidit.model.context import Positions
from vidit.model.linear import Linear
from vidit.model.modulation import FrameVectors, output_modulation
from vidit.model.norm import Norm, modulate
from vidit.model.packed import of_clips, tokens_of
from vidit.model.refiner import Refiner
from vidit.model.windows import Grid

PACKED = 4
"""Dims of a packed latent, where others have five."""


class PatchEmbed(nn.Module):
    """(B, C, T, H, W) -> (B, S, D) with S = T/t H/h W/w for patches of (t, h, w); a packed latent (1, S, P, C) too.

    With `self_conditioned` the estimate of a first pass takes as many channels again; None is an estimate of zeros.
    With `given` a second projection, which starts at zero, sees given frames and their mask (`Grid`); None adds zero.
    """

    def __init__(
        self,
        channels: int,
        patch: tuple[int, int, int],
        width: int,
        self_conditioned: bool = False,
        given: bool = False,
    ):
        super().__init__()
        self.patch, self.self_conditioned = patch, self_conditioned
        self.project = Linear(channels * (2 if self_conditioned else 1) * math.prod(patch), width)
        self.given = Linear((channels + 1) * math.prod(patch), width, bias=False) if given else None

    def forward(self, x: Tensor, previous: Tensor | None = None, given: Tensor | None = None) -> Tensor:
        x_BSPC = self.fold(x)
        whole = x_BSPC
        if self.self_conditioned:
            estimate = torch.zeros_like(x_BSPC) if previous is None else self.fold(previous)
            whole = torch.cat((x_BSPC, estimate), dim=-1)
        tokens = self.project(whole.flatten(2))
        if self.given is None:
            return tokens
        if given is None:  # its weights take part all the same: ranks that divide them go together
            return tokens + self.given(x_BSPC.new_zeros(*x_BSPC.shape[:2], self.given.in_features))
        return tokens + self.given(self.fold(given).flatten(2))

    def fold(self, x: Tensor) -> Tensor:
        """The numbers of each patch side by side, (B, S, P, C), as a packed latent has them already."""
        return x if x.ndim == PACKED else tokens_of(x, self.patch)


class TextEmbed(nn.Module):
    """Text features E -> model width D, two layers or one, token by token; then what refines captions, if they are."""

    def __init__(self, c: Model, text_width: int):
        super().__init__()
        self.approximate = GELU[c.activation]
        self.up = Linear(text_width, c.width) if c.text_embedding == "mlp" else None
        self.out = Linear(c.width if self.up else text_width, c.width)
        self.refiner = Refiner(c, text_width) if c.num_refiner_layers else None

    def forward(self, text_BLE: Tensor, time_B: Tensor, frame_BL: Tensor | None, images: bool) -> Tensor:
        x = self.out(text_BLE if self.up is None else F.gelu(self.up(text_BLE), approximate=self.approximate))
        return x if self.refiner is None else self.refiner(x, text_BLE, time_B, frame_BL, images)


class Head(nn.Module):
    """Tokens of the video back to a latent, packed or not: modulated norm, linear, un-patchify; fp32 out.

    With `norm_affine` a norm of the residual stream comes first, as in CogVideoX.
    """

    def __init__(self, c: Model, channels: int):
        super().__init__()
        self.patch, self.channels = c.patch, channels
        self.final_norm = Norm(c.width, affine=True, eps=c.norm_eps) if c.norm_affine else nn.Identity()
        self.norm = Norm(c.width, c.norm_affine, c.norm_eps)
        self.modulation = output_modulation(c)
        self.frames = FrameVectors() if c.frame_times else None
        self.project = Linear(c.width, c.patch_size * channels * c.out_factor)

    def forward(self, tokens: Tokens, cond_BRD: Tensor, grid: Grid, positions: Positions | None = None) -> Tensor:
        x_BSD, *_ = as_streams(tokens)
        vectors = self.modulation(cond_BRD)
        if self.frames is not None:
            vectors = self.frames(vectors, positions, grid)
        elif grid.clips and positions is not None:
            vectors = of_clips(vectors, positions.position_S3)
        shift, scale = vectors
        normed = self.norm(self.final_norm(x_BSD))
        x = widen(self.project(modulate(normed, shift, scale).to(x_BSD.dtype)))
        if grid.clips:
            return x.unflatten(-1, (math.prod(self.patch), -1))[..., : self.channels]
        x = x.reshape(x.shape[0], *grid.shape, *self.patch, -1)[..., : self.channels]
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
