"""Where tokens are: what is added to them for it, and the rotary angles of every place.

Learned tables are W.A.L.T.'s (2312.06662, section 3.2), a sum of space and time, images at time 0. Sinusoids are fixed
and computed in fp64, so nothing is stored and any grid will do.
"""

import torch
from torch import Tensor, nn

from vidit.config import Model, Window
from vidit.model.context import Positions
from vidit.model.packed import FirstToken, is_image, runs
from vidit.model.rope import THETA, Split, rope_angles
from vidit.model.windows import Grid


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
        space = self.width * 3 // 8
        time, height, width = (steps(n, device) / scale for n, scale in zip(grid.shape, self.scale, strict=True))
        t, plane = sinusoids(time, self.width - 2 * space), space_sinusoids(height, width, space)
        clip = torch.cat((t[:, None].expand(-1, len(plane), -1), plane[None].expand(len(t), -1, -1)), dim=-1)
        if grid.image_B is None:
            return clip.flatten(0, 1)
        return torch.where(grid.image_B[:, None, None], clip[:1].expand_as(clip).flatten(0, 1), clip.flatten(0, 1))


class SpacePosition(nn.Module):
    """Fixed sinusoids of width and height, half of D each: (S, D) fp32, the same in every frame (Latte, 2401.03048;
    STDiT3).

    With a `span` the places of each axis go from 0 to that, however many tokens there are.
    """

    def __init__(self, width: int, scale: tuple[float, float, float], span: int):
        super().__init__()
        self.width, self.scale, self.span = width, scale[1:], span

    def forward(self, grid: Grid, device: torch.device) -> Tensor:
        pairs = zip(grid.shape[1:], self.scale, strict=True)
        height, width = (steps(n, device) * ((self.span or n) / n) / scale for n, scale in pairs)
        return space_sinusoids(height, width, self.width // 2).repeat(grid.frames, 1)


class TimePosition(nn.Module):
    """Sinusoids of the latent frame, for the tokens of this rank: (1 or B, S, D) fp32; zeros for images (Latte)."""

    def __init__(self, width: int, scale: tuple[float, float, float]):
        super().__init__()
        self.width, self.scale = width, scale[0]

    def forward(self, positions: Positions, grid: Grid) -> Tensor:
        table = sinusoids(positions.position_S3[:, 0].double() / self.scale, self.width)[None]
        if grid.clips:
            return table.masked_fill(is_image(positions.position_S3, grid)[:, None], 0.0)
        if grid.frames == 1:
            return torch.zeros_like(table)
        return table if grid.image_B is None else table.masked_fill(grid.image_B[:, None, None], 0.0)


def steps(n: int, device: torch.device) -> Tensor:
    """0 .. n - 1."""
    return torch.arange(n, device=device, dtype=torch.float64)


def sinusoids(place: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of places (n,): (n, width) fp32."""
    angle = place[:, None] * 10_000 ** (-steps(width // 2, place.device) / (width // 2))
    return torch.cat((angle.sin(), angle.cos()), dim=-1).float()


def space_sinusoids(height: Tensor, width: Tensor, half: int) -> Tensor:
    """(H W, 2 half): of the width, then of the height."""
    h, w = sinusoids(height, half), sinusoids(width, half)
    return torch.cat((w[None].expand(len(h), -1, -1), h[:, None].expand(-1, len(w), -1)), dim=-1).flatten(0, 1)


def places(shape: Window, device: torch.device) -> Tensor:
    """(t, h, w) of each token: (S, 3)."""
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in shape), indexing="ij")
    return torch.stack([axis.flatten() for axis in axes], dim=-1)


def packed_places(grid: Grid, device: torch.device) -> Tensor:
    """Of a packed row (t, h, w) of each token in its clip, and the number of that: (S, 4)."""
    clips = [nn.functional.pad(places(shape, device), (0, 1), value=clip) for clip, shape in enumerate(grid.clips)]
    return torch.cat(clips)


def placed(table: nn.Module, grid: Grid, device: torch.device) -> Tensor:
    """What a module of this file adds to the tokens at the start, each clip of a packed row by itself."""
    if not grid.clips:
        whole: Tensor = table(grid, device)
        return whole
    return torch.cat([table(run.grid, device).repeat(run.clips.stop - run.clips.start, 1) for run in runs(grid)])


def absolute_position(c: Model, grid: tuple[int, int, int]) -> nn.Module | None:
    """What `model.absolute_position` adds at the start."""
    if c.absolute_position == "none":
        return None
    if c.absolute_position == "learned":
        return AbsolutePosition(grid, c.width)
    if c.absolute_position == "sincos":
        return SincosPosition(c.width, c.position_scale)
    return SpacePosition(c.width, c.position_scale, c.position_span)


class TokenPositions(nn.Module):
    """The (t, h, w) place of every token of the grid, and its rotary angles; of a packed row also its clip's number."""

    def __init__(self, head_dim: int, split: Split = "quarter", theta: float = THETA):
        super().__init__()
        self.head_dim, self.split, self.theta = head_dim, split, theta

    def forward(self, grid: Grid, device: torch.device) -> Positions:
        position_S3 = packed_places(grid, device) if grid.clips else places(grid.shape, device)
        angles = rope_angles(position_S3, self.head_dim, self.split, self.theta)
        return Positions(position_S3, *angles, FirstToken() if grid.clips else None)
