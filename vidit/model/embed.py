"""What happens before the blocks and after them: patches, time, text, positions, output.

W.A.L.T. (2312.06662, section 3.2): p x p patches of each latent frame; learned absolute positions as the sum
of a space table and a time table, images at time 0; self-conditioning enters by channel concatenation.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidit.config import Model
from vidit.dtypes import widen
from vidit.model.attention import Positions
from vidit.model.block import GELU, Tokens, as_streams
from vidit.model.linear import Linear
from vidit.model.modulation import output_modulation
from vidit.model.norm import Norm, modulate
from vidit.model.rope import Split, rope_angles
from vidit.model.windows import Grid


class PatchEmbed(nn.Module):
    """(B, C, T, H, W) -> (B, S, D) with S = T H/p W/p.

    With `self_conditioned` the estimate of a first pass takes as many channels again; None is an estimate of zeros.
    """

    def __init__(self, channels: int, patch: int, width: int, self_conditioned: bool = False):
        super().__init__()
        self.patch, self.self_conditioned = patch, self_conditioned
        self.project = Linear(channels * (2 if self_conditioned else 1) * patch * patch, width)

    def forward(self, x_BCTHW: Tensor, previous_BCTHW: Tensor | None = None) -> Tensor:
        if self.self_conditioned:
            previous = torch.zeros_like(x_BCTHW) if previous_BCTHW is None else previous_BCTHW
            x_BCTHW = torch.cat((x_BCTHW, previous), dim=1)
        b, c, t, h, w = x_BCTHW.shape
        p = self.patch
        x = x_BCTHW.reshape(b, c, t, h // p, p, w // p, p).permute(0, 2, 3, 5, 4, 6, 1)
        return self.project(x.reshape(b, t * (h // p) * (w // p), p * p * c))


class TimeEmbed(nn.Module):
    """Sinusoids of the diffusion time (about 0 to 1000) through a two-layer MLP, fp32: (B,) -> (B, D)."""

    def __init__(self, frequencies: int, width: int):
        super().__init__()
        self.up = Linear(frequencies, width)
        self.out = Linear(width, width)

    def forward(self, time_B: Tensor) -> Tensor:
        half = self.up.in_features // 2
        steps = torch.arange(half, dtype=torch.float32, device=time_B.device)
        angle = widen(time_B)[:, None] * torch.exp(-math.log(10_000) * steps / half)
        return self.out(F.silu(self.up(torch.cat((angle.cos(), angle.sin()), dim=-1))))


class TextEmbed(nn.Module):
    """Text features E -> model width D, two layers or one."""

    def __init__(self, c: Model, text_width: int):
        super().__init__()
        self.approximate = GELU[c.activation]
        self.up = Linear(text_width, c.width) if c.text_embedding == "mlp" else None
        self.out = Linear(c.width if self.up else text_width, c.width)

    def forward(self, text_BLE: Tensor) -> Tensor:
        return self.out(text_BLE if self.up is None else F.gelu(self.up(text_BLE), approximate=self.approximate))


class AbsolutePosition(nn.Module):
    """Learned space and time tables: (S, D). The tables' size is the largest grid the model takes."""

    def __init__(self, grid: tuple[int, int, int], width: int):
        super().__init__()
        self.time = nn.Parameter(torch.empty(grid[0], width))
        self.space = nn.Parameter(torch.empty(grid[1], grid[2], width))

    def forward(self, grid: Grid, device: torch.device) -> Tensor:
        largest = (self.time.shape[0], *self.space.shape[:2])
        if any(n > most for n, most in zip(grid.shape, largest, strict=True)):
            raise ValueError(
                f"a grid of {grid.shape} latent tokens exceeds the position tables' {largest}; "
                "sample at most the training size, or train with model.absolute_position=false"
            )
        # Times one: of a grid of one token, autograd would give both tables one tensor as their gradient.
        time = self.time[: grid.frames, None, :] * 1
        space = self.space[: grid.height, : grid.width].reshape(1, grid.height * grid.width, -1)
        table = (time + space).flatten(0, 1)
        if grid.image_B is None:
            return table
        image = (self.time[:1, None, :] + space).expand(grid.frames, -1, -1).flatten(0, 1)
        return torch.where(grid.image_B[:, None, None], image, table)


class SincosPosition(nn.Module):
    """Fixed sinusoids of the places: (S, D) fp32, D/4 of it for time, then 3/8 each for width and height (CogVideoX).

    Images are at time 0. The places (t, h, w) are divided by `scale`.
    """

    def __init__(self, width: int, scale: tuple[float, float, float]):
        super().__init__()
        self.width, self.scale = width, scale

    def forward(self, grid: Grid, device: torch.device) -> Tensor:
        places = (torch.arange(n, device=device, dtype=torch.float64) for n in grid.shape)
        time, height, width = (place / scale for place, scale in zip(places, self.scale, strict=True))
        space = self.width * 3 // 8
        t, h, w = sinusoids(time, self.width - 2 * space), sinusoids(height, space), sinusoids(width, space)
        plane = torch.cat((w[None].expand(len(h), -1, -1), h[:, None].expand(-1, len(w), -1)), dim=-1).flatten(0, 1)
        clip = torch.cat((t[:, None].expand(-1, len(plane), -1), plane[None].expand(len(t), -1, -1)), dim=-1)
        if grid.image_B is None:
            return clip.flatten(0, 1)
        return torch.where(grid.image_B[:, None, None], clip[:1].expand_as(clip).flatten(0, 1), clip.flatten(0, 1))


def sinusoids(place: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of places (n,): (n, width) fp32."""
    steps = torch.arange(width // 2, device=place.device, dtype=torch.float64)
    angle = place[:, None] * 10_000 ** (-steps / (width // 2))
    return torch.cat((angle.sin(), angle.cos()), dim=-1).float()


def absolute_position(c: Model, grid: tuple[int, int, int]) -> nn.Module | None:
    """What `model.absolute_position` says."""
    if c.absolute_position == "none":
        return None
    return (
        AbsolutePosition(grid, c.width)
        if c.absolute_position == "learned"
        else SincosPosition(c.width, c.position_scale)
    )


class TokenPositions(nn.Module):
    """The (t, h, w) place of every token of the grid, and its rotary angles."""

    def __init__(self, head_dim: int, split: Split = "quarter"):
        super().__init__()
        self.head_dim, self.split = head_dim, split

    def forward(self, grid: Grid, device: torch.device) -> Positions:
        axes = torch.meshgrid(*(torch.arange(n, device=device) for n in grid.shape), indexing="ij")
        position_S3 = torch.stack([axis.flatten() for axis in axes], dim=-1)
        return Positions(position_S3, *rope_angles(position_S3, self.head_dim, self.split))


class Head(nn.Module):
    """Tokens of the video back to a latent: modulated norm, linear, un-patchify; fp32 out.

    With `norm_affine` a norm of the residual stream comes first, as in CogVideoX.
    """

    def __init__(self, c: Model, channels: int):
        super().__init__()
        self.patch, self.channels = c.patch, channels
        self.final_norm = Norm(c.width, affine=True, eps=c.norm_eps) if c.norm_affine else nn.Identity()
        self.norm = Norm(c.width, c.norm_affine, c.norm_eps)
        self.modulation = output_modulation(c)
        self.project = Linear(c.width, c.patch * c.patch * channels)

    def forward(self, tokens: Tokens, cond_BRD: Tensor, grid: Grid) -> Tensor:
        x_BSD, *_ = as_streams(tokens)
        shift, scale = self.modulation(cond_BRD)
        normed = self.norm(self.final_norm(x_BSD))
        x = widen(self.project(modulate(normed, shift, scale).to(x_BSD.dtype)))
        p = self.patch
        x = x.reshape(x.shape[0], *grid.shape, p, p, self.channels).permute(0, 6, 1, 2, 4, 3, 5)
        return x.reshape(x.shape[0], self.channels, grid.frames, grid.height * p, grid.width * p)
