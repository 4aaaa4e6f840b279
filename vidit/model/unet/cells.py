"""Where the cells of a U-Net stand and how wide they are, from the config alone. No torch.

A cell is a residual block, and behind it attention where its level has that. On the way up each cell is given, beside
what it works on, what stood at its mirror image on the way down.
"""

from dataclasses import dataclass

from vidit.config import Unet


@dataclass(frozen=True)
class CellShape:
    """Channels in and out, and whether attention follows."""

    channels: int
    width: int
    attends: bool


@dataclass(frozen=True)
class Cells:
    """By level from the finest on: the cells on the way down, at the bottom, and on the way up from the coarsest."""

    down: tuple[tuple[CellShape, ...], ...]
    mid: tuple[CellShape, ...]
    up: tuple[tuple[CellShape, ...], ...]


def cells(c: Unet) -> Cells:
    """Of a config without faults."""
    skips, now = [c.channels], c.channels
    down, up = [], []
    for level, (width, attends) in enumerate(zip(c.widths, c.attention, strict=True)):
        own = []
        for _ in range(c.num_res_blocks):
            own.append(CellShape(now, width, attends))
            now = width
            skips.append(now)
        if level + 1 < len(c.widths):
            skips.append(now)  # what the step to the next level gives
        down.append(tuple(own))
    mid = (CellShape(now, now, True), CellShape(now, now, False))
    for width, attends in zip(reversed(c.widths), reversed(c.attention), strict=True):
        own = []
        for _ in range(c.num_res_blocks + 1):
            own.append(CellShape(now + skips.pop(), width, attends))
            now = width
        up.append(tuple(own))
    assert not skips
    return Cells(tuple(down), mid, tuple(up))
