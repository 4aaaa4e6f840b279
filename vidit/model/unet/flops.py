"""Arithmetic of the U-Net: parameters and FLOPs from the config alone, without torch.

As for the DiT (`vidit/model/flops.py`) two FLOPs are counted for each multiply-add of a product, attention included,
and none for norms, activations and the vector of the diffusion time.
"""

from collections.abc import Iterator

from vidit.config import Unet
from vidit.model.unet.cells import CellShape, cells

Grid = tuple[int, int, int]


def unet_flops(c: Unet, grid: Grid, channels: int, text_width: int, text_tokens: int) -> int:
    """FLOPs of one forward pass of one clip."""
    shapes, sizes = cells(c), _sizes(c, grid)
    total = _conv(9, channels, c.channels, grid) + _conv(9, c.channels, channels, grid)
    for level, own in enumerate(shapes.down):
        if level + 1 < len(sizes):
            total += _conv(9, c.widths[level], c.widths[level], sizes[level + 1])
        total += sum(_cell_flops(c, shape, sizes[level], text_width, text_tokens) for shape in own)
    total += sum(_cell_flops(c, shape, sizes[-1], text_width, text_tokens) for shape in shapes.mid)
    for level, own in zip(reversed(range(len(sizes))), shapes.up, strict=True):
        if level:
            total += _conv(9, c.widths[level], c.widths[level], sizes[level - 1])
        total += sum(_cell_flops(c, shape, sizes[level], text_width, text_tokens) for shape in own)
    return total


def unet_parameters(c: Unet, frames: int, channels: int, text_width: int) -> int:
    """Parameters of the U-Net; equal to what `VideoUnet` allocates for clips of at most so many latent frames."""
    d, cond = c.channels, c.cond_width
    total = (d + 1) * cond + (cond + 1) * cond + ((text_width + 1) * cond if c.pooled_text else 0)
    total += (d + 1) * cond + (cond + 1) * cond if c.frame_rate else 0
    total += 9 * channels * d + d + 2 * d + 9 * d * channels + channels
    total += sum(9 * width * width + width for width in (*c.widths[:-1], *c.widths[1:]))
    return total + sum(_cell_parameters(c, shape, text_width, frames) for shape in _all(c))


def _all(c: Unet) -> Iterator[CellShape]:
    shapes = cells(c)
    for own in (*shapes.down, shapes.mid, *shapes.up):
        yield from own


def _sizes(c: Unet, grid: Grid) -> list[Grid]:
    """(T, H, W) of each level; a step down rounds up."""
    t, h, w = grid
    found = []
    for _ in c.widths:
        found.append((t, h, w))
        h, w = (h + 1) // 2, (w + 1) // 2
    return found


def _conv(kernel: int, channels: int, width: int, size: Grid) -> int:
    return 2 * kernel * channels * width * size[0] * size[1] * size[2]


def _cell_flops(c: Unet, shape: CellShape, size: Grid, text_width: int, text_tokens: int) -> int:
    d, (frames, height, width) = shape.width, size
    places = height * width
    tokens = frames * places
    own_keys, text_keys = 2 * text_tokens * 2 * text_width * d, 4 * tokens * text_tokens * d
    total = _conv(9, shape.channels, d, size) + _conv(9, d, d, size)
    total += _conv(1, shape.channels, d, size) if shape.channels != d else 0
    if c.temporal != "none":
        total += c.temporal_convs * _conv(3, d, d, size)
    if not shape.attends:
        return total
    total += 2 * tokens * (2 + 4) * d * d + 4 * tokens * places * d + 2 * tokens * 12 * d * d
    if c.cross_attention:
        total += 2 * tokens * 2 * d * d + own_keys + text_keys
    for part in c.temporal_attention if c.temporal != "none" else ():
        if part == "mlp":
            total += 2 * tokens * 12 * d * d
        elif part == "self":
            total += 2 * tokens * 4 * d * d + 4 * tokens * frames * d
        else:
            total += 2 * tokens * 2 * d * d + own_keys + text_keys
    if _positioned(c):
        total += 2 * frames * 8 * d * d
    return total


def _cell_parameters(c: Unet, shape: CellShape, text_width: int, frames: int) -> int:
    d, cond, mix = shape.width, c.cond_width, int(c.temporal == "mixed")
    norm, mlp, cross = 2 * d, 12 * d * d + 9 * d, 2 * d * d + 2 * text_width * d + d
    total = 2 * shape.channels + norm + 9 * (shape.channels + d) * d + 2 * d + (cond + 1) * d
    total += (shape.channels + 1) * d if shape.channels != d else 0
    if c.temporal != "none" and c.temporal_convs:
        total += c.temporal_convs * (norm + 3 * d * d + d) + ((cond + 1) * d if c.adds_time else 0) + mix
    if not shape.attends:
        return total
    total += 3 * norm + 2 * (d + 1) * d + 4 * d * d + d + mlp + (norm + cross if c.cross_attention else 0)
    if c.temporal != "none" and c.temporal_attention:
        table = c.heads(d) * (2 * frames - 1) if c.temporal_position == "bias" else 0
        own = {"self": 4 * d * d + d + table, "cross": cross, "mlp": mlp}
        total += mix + sum(norm + own[part] for part in c.temporal_attention)
        total += 8 * d * d + 5 * d if _positioned(c) else 0
    return total


def _positioned(c: Unet) -> bool:
    return c.has_self_attention and c.temporal_position == "sinusoid"
