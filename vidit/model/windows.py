"""Cutting the token grid into attention windows, and back.

W.A.L.T. (2312.06662, section 3.2) alternates non-overlapping windows of one latent frame (1 x h x w) and of
space-time (t x h' x w'). Full, spatial, temporal and window attention are the same thing with different
sizes: (T, H, W), (1, H, W), (T, 1, 1), (t, h, w).

Skiparse (Open-Sora-Plan, 2412.00131) numbers the tokens of a clip and takes every k-th (`single`), or every k-th group
of k (`group`): one axis of a (n, k, k) grid of these numbers, so the same cutting serves (`folded`).
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vidit.config import AnyWindow, Skip, Window


@dataclass(frozen=True)
class Grid:
    """The token grid of a whole clip (never of one rank's share), as the attention core needs it.

    `image_B` marks rows that hold T independent images instead of a clip of T latent frames; None says that
    there are none, which keeps the cheap paths open. `fps_B` are the frames a second of each clip, 0 of images, where
    `model.frame_rate` asks for them. `still_B` marks clips without motion, whose temporal attention sees its own frame
    alone. `given_BCTHW` are the given latent frames, zeros elsewhere, and behind them a channel of ones where they are.

    A packed row (`vidit/model/packed.py`) is one row of `width` tokens, in which `clips` lie side by side, each of its
    own shape; what is known of rows is then known of clips, and `given_BCTHW` has the form of a packed latent.
    """

    frames: int
    height: int
    width: int
    image_B: Tensor | None = None
    fps_B: Tensor | None = None
    still_B: Tensor | None = None
    given_BCTHW: Tensor | None = None
    clips: tuple[Window, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width

    @property
    def through_time(self) -> "Grid":
        """As temporal attention sees it, to which clips without motion are rows of images."""
        if self.still_B is None:
            return self
        return replace(self, image_B=self.still_B if self.image_B is None else self.image_B | self.still_B)

    @property
    def num_tokens(self) -> int:
        return self.frames * self.height * self.width


def folded(skip: Skip, grid: Grid) -> tuple[Window, Grid]:
    """The window of the same tokens on the grid (n, k, k) of their numbers i, some of the last past the clip.

    Its axes are i // k^2, i // k mod k and i mod k.
    """
    kind, k = skip
    planes = -(-grid.num_tokens // (k * k))
    return (planes, k, 1) if kind == "single" else (planes, 1, k), Grid(planes, k, k)


def counts(window: tuple[int, int, int], grid: Grid) -> tuple[int, int, int]:
    """How many windows each axis has, the last of them padded where it does not divide."""
    t, h, w = (-(-axis // size) for size, axis in zip(window, grid.shape, strict=True))
    return t, h, w


def partition(x: Tensor, window: AnyWindow, grid: Grid) -> Tensor:
    """(B, S, ...) -> (B * windows, tokens of a window, ...), zeros where a window reaches past the grid."""
    if len(window) == 2:
        window, whole = folded(window, grid)
        x, grid = F.pad(x, (0, 0) * (x.ndim - 2) + (0, whole.num_tokens - grid.num_tokens)), whole
    (t, h, w), (nt, nh, nw) = window, counts(window, grid)
    batch, rest = x.shape[0], x.shape[2:]
    if (nt, nh, nw) == (1, 1, 1):
        return x
    if (nh, nw) == (1, 1) and nt * t == grid.frames:
        return x.reshape(batch * nt, t * h * w, *rest)
    x = x.reshape(batch, *grid.shape, -1)
    pad = (nt * t - grid.frames, nh * h - grid.height, nw * w - grid.width)
    if any(pad):
        x = F.pad(x, (0, 0, 0, pad[2], 0, pad[1], 0, pad[0]))
    x = x.reshape(batch, nt, t, nh, h, nw, w, x.shape[-1]).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(batch * nt * nh * nw, t * h * w, *rest)


def merge(x: Tensor, window: AnyWindow, grid: Grid) -> Tensor:
    """The inverse of `partition`, padding dropped: (B * windows, tokens of a window, ...) -> (B, S, ...)."""
    if len(window) == 2:
        return merge(x, *folded(window, grid))[:, : grid.num_tokens]
    (t, h, w), (nt, nh, nw) = window, counts(window, grid)
    batch, rest = x.shape[0] // (nt * nh * nw), x.shape[2:]
    if (nt, nh, nw) == (1, 1, 1):
        return x
    if (nh, nw) == (1, 1) and nt * t == grid.frames:
        return x.reshape(batch, grid.num_tokens, *rest)
    x = x.reshape(batch, nt, nh, nw, t, h, w, -1).permute(0, 1, 4, 2, 5, 3, 6, 7)
    x = x.reshape(batch, nt * t, nh * h, nw * w, -1)[:, : grid.frames, : grid.height, : grid.width]
    return x.reshape(batch, grid.num_tokens, *rest)


def padding_mask(window: AnyWindow, grid: Grid, device: torch.device) -> Tensor | None:
    """True where a window's token exists: (windows, tokens of a window), or None where all do."""
    size, whole = folded(window, grid) if len(window) == 2 else (window, grid)
    if whole.num_tokens == grid.num_tokens and all(
        n * s == axis for n, s, axis in zip(counts(size, whole), size, whole.shape, strict=True)
    ):
        return None
    ones = torch.ones(1, grid.num_tokens, 1, dtype=torch.bool, device=device)
    return partition(ones, window, grid)[..., 0]


def numbering(window: AnyWindow, grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """(window of each token, its place there), both (S,): the rows and columns of what `partition` makes."""
    if len(window) == 2:
        of_window, place = numbering(*folded(window, grid), device)
        return of_window[: grid.num_tokens], place[: grid.num_tokens]
    windows, places = torch.zeros((), dtype=torch.long, device=device), torch.zeros((), dtype=torch.long, device=device)
    axes = torch.meshgrid(*(torch.arange(axis, device=device) for axis in grid.shape), indexing="ij")
    for index, size, count in zip(axes, window, counts(window, grid), strict=True):
        windows, places = windows * count + index // size, places * size + index % size
    return windows.flatten(), places.flatten()
