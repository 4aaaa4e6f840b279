"""How far around a latent the VAE looks in space: what a tile needs around it to be exact.

Walked backwards through the layers, as an interval of places: a convolution of 3 takes one more on each side, a
joint that halves or doubles scales it. In time nothing is needed, for the streams are exact.
"""

from vidit.config import Vae

Interval = tuple[int, int]


def encoder_margin(c: Vae) -> int:
    """Latents around a latent whose pixels it depends on, on each side."""
    low, high = 0, 0
    for level in reversed(range(len(c.multipliers))):
        if level < len(c.spatial_down):
            low, high = (2 * low, 2 * high + 1) if c.spatial_down[level] else (low, high)
            # A strided convolution reads one more on the left; one without stride reads one on each side.
            low, high = low - 1, high + (0 if c.spatial_down[level] else 1)
        reach = 2 * c.num_res_blocks[level]
        low, high = low - reach, high + reach
    low, high = (low - 1) * c.patch, (high + 1) * c.patch + c.patch - 1
    s = c.spatial_stride
    return max(-(low // s), high // s)


def decoder_margin(c: Vae) -> int:
    """Latents around a latent on which its pixels depend, on each side."""
    low, high = 0, c.spatial_stride - 1
    low, high = low // c.patch - 1, high // c.patch + 1
    for level in range(len(c.multipliers)):
        if level:
            low, high = (low // 2, high // 2) if c.spatial_down[level - 1] else (low, high)
        reach = 2 * c.decoder_res_blocks[level]
        low, high = low - reach, high + reach
    return max(-(low - 1), high + 1)
