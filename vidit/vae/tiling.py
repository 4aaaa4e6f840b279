"""Space in tiles, for frames too large to be coded at once: each tile is a stream of its own.

A tile is coded with `overlap` around it. Where that covers all that its places depend on (`vidit/vae/receptive.py`)
the rest is cut off and the result is that of the whole frame. With less, neighbours differ where they meet, and are
blended over the whole overlap, with weights that fall to the tile's rim, where what is missing counts most.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from vidit.vae.streaming import Stream


class Span(NamedTuple):
    """One tile along one axis, in latents: its own places [start, stop), and those it is coded from."""

    start: int
    stop: int
    first: int
    last: int


class Grid(NamedTuple):
    """How an axis is cut, in latents: size of a tile, overlap on each side, and the margin that makes it exact."""

    tile: int
    overlap: int
    margin: int | None

    def spans(self, size: int) -> list[Span]:
        """The tiles of an axis of that many latents, as even as they can be."""
        count = -(-size // self.tile)
        ends = [size * n // count for n in range(count + 1)]
        return [Span(a, b, max(0, a - self.overlap), min(size, b + self.overlap)) for a, b in pairwise(ends)]

    def weights(self, span: Span, size: int) -> Tensor:
        """What each place of a tile counts, (last - first,)."""
        places = torch.arange(span.first, span.last) + 0.5
        if self.overlap == 0 or (self.margin is not None and self.overlap >= self.margin):
            return ((places > span.start) & (places < span.stop)).float()
        rise = (places - (span.start - self.overlap)) / (2 * self.overlap)
        fall = ((span.stop + self.overlap) - places) / (2 * self.overlap)
        ones = torch.ones_like(places)
        return torch.minimum(rise if span.start else ones, fall if span.stop < size else ones).clamp(0, 1)


class TiledStream:
    """A stream over space in tiles; `inside` and `outside` are the places of its input and output for each latent.

    Args:
        open_stream: begins the stream of one tile.
    """

    def __init__(self, open_stream: Callable[[], Stream], grid: Grid, inside: int, outside: int):
        self.open_stream, self.grid, self.inside, self.outside = open_stream, grid, inside, outside
        self.streams: list[Stream] = []

    def push(self, chunk_BCTHW: Tensor) -> Tensor | None:
        """As of the streams. ValueError for a side that the strides do not divide."""
        height, width = (self._latents(side) for side in chunk_BCTHW.shape[-2:])
        tiles = list(self._tiles(height, width))
        self.streams = self.streams or [self.open_stream() for _ in tiles]
        out: Tensor | None = None
        total: Tensor | None = None
        for stream, (y, x) in zip(self.streams, tiles, strict=True):
            i = self.inside
            part = stream.push(chunk_BCTHW[..., y.first * i : y.last * i, x.first * i : x.last * i])
            if part is None:
                continue
            o = self.outside
            if out is None or total is None:
                out = part.new_zeros(*part.shape[:3], height * o, width * o)
                total = part.new_zeros(height * o, width * o)
            weights = self._weights(y, height, part)[:, None] * self._weights(x, width, part)
            place = (..., slice(y.first * o, y.last * o), slice(x.first * o, x.last * o))
            out[place] += part * weights
            total[place] += weights
        return None if out is None or total is None else out / total

    def finish(self) -> None:
        """ValueError where frames wait for more."""
        for stream in self.streams:
            stream.finish()

    def _tiles(self, height: int, width: int) -> Iterator[tuple[Span, Span]]:
        columns = self.grid.spans(width)
        for y in self.grid.spans(height):
            for x in columns:
                yield y, x

    def _weights(self, span: Span, size: int, like: Tensor) -> Tensor:
        """Of the places of the output, as those of the latents that they belong to."""
        return self.grid.weights(span, size).repeat_interleave(self.outside).to(like)

    def _latents(self, side: int) -> int:
        if side % self.inside:
            raise ValueError(f"a side of {side} is not divisible by the VAE's stride {self.inside}")
        return side // self.inside
