"""The layers of encoder and decoder, level by level: residual blocks, what joins levels, attention in the middle.

| vae.layers | joints                                                   | the width changes in   |
|------------|----------------------------------------------------------|------------------------|
| residual   | `Down`, `Up`: with shortcuts (DC-AE, 2410.10733)         | the joint              |
| ldm        | `Halve`, `Double`: plain (latent diffusion, 2112.10752)  | a level's first block  |

The second are those of Stable Diffusion's autoencoder, whose weights can begin a causal one (`vidit/vae/inflate.py`).
"""

from torch import nn

from vidit.config import Vae
from vidit.vae.attention import FrameAttention
from vidit.vae.layers import Double, Down, Halve, ResBlock, Up


def encoder_levels(c: Vae) -> nn.Sequential:
    """Finest level first."""
    widths = _widths(c)
    layers: list[nn.Module] = []
    given = widths[0]
    for level, width in enumerate(widths):
        count = c.num_res_blocks[level]
        layers += _blocks(c, level, given, count, max(1, count - 1))
        if level + 1 < len(widths):
            space, time = c.spatial_down[level], c.temporal_down[level]
            layers.append(
                Halve(width, space, time) if c.layers == "ldm" else Down(width, widths[level + 1], space, time)
            )
        given = width
    return nn.Sequential(*layers)


def decoder_levels(c: Vae) -> nn.Sequential:
    """Coarsest level first."""
    widths = _widths(c)
    layers: list[nn.Module] = []
    given = widths[-1]
    for level in reversed(range(len(widths))):
        width = widths[level]
        layers += _blocks(c, level, given, c.decoder_res_blocks[level], 1)
        if level:
            space, time = c.spatial_down[level - 1], c.temporal_down[level - 1]
            layers.append(
                Double(width, space, time) if c.layers == "ldm" else Up(width, widths[level - 1], space, time)
            )
        given = width
    return nn.Sequential(*layers)


def _widths(c: Vae) -> list[int]:
    return [c.base_channels * m for m in c.multipliers]


def _blocks(c: Vae, level: int, given: int, count: int, middle: int) -> list[nn.Module]:
    """So many residual blocks for `given` channels, of the coarsest level with attention behind so many: `middle`.

    That is behind one that has changed the width.
    """
    width = _widths(c)[level]
    first = given if c.layers == "ldm" else width
    blocks: list[nn.Module] = [ResBlock(c, width if number else first, width) for number in range(count)]
    if c.mid_attention and level + 1 == len(c.multipliers):
        blocks.insert(middle, FrameAttention(c, width))
    return blocks
