"""A clip through a frozen VAE in parts of the size that the config allows: `vae.max_frames`, `vae.tile`.

What a clip takes in memory is then that of a part, and of what every convolution remembers. The numbers are those
of one pass, but for tiles whose overlap does not cover what they depend on. A class of diffusers has parts of its own.
"""

import torch
from torch import Tensor

from vidit.config import Vae
from vidit.vae.autoencoder import Autoencoder, CausalVae, Posterior, posterior
from vidit.vae.borrowed import BorrowedVae
from vidit.vae.heap import keep_freed_memory
from vidit.vae.receptive import decoder_margin, encoder_margin
from vidit.vae.streaming import DecodeStream, EncodeStream, Stream
from vidit.vae.tiling import Grid, TiledStream


@torch.no_grad()
def encode_clip(vae: Autoencoder, x_BCTHW: Tensor, limits: Vae) -> Posterior:
    """The posterior of pixels (B, 3, 1 + T, H, W). ValueError for sizes that do not divide."""
    vae.check_size(x_BCTHW.shape)
    keep_freed_memory()
    if isinstance(vae, BorrowedVae):
        vae.limit(limits)
        return vae.encode(x_BCTHW)
    assert isinstance(vae, CausalVae)
    if _fits(x_BCTHW, limits, 1, 1):
        return vae.encode(x_BCTHW)
    frames = limits.max_frames // limits.temporal_stride * limits.temporal_stride
    return posterior(_in_parts(open_encoder(vae, limits), x_BCTHW, frames))


@torch.no_grad()
def decode_clip(vae: Autoencoder, z_BCTHW: Tensor, limits: Vae) -> Tensor:
    """Pixels of a raw latent (B, c, T, H, W)."""
    keep_freed_memory()
    if isinstance(vae, BorrowedVae):
        vae.limit(limits)
        return vae.decode(z_BCTHW)
    assert isinstance(vae, CausalVae)
    if _fits(z_BCTHW, limits, limits.temporal_stride, limits.spatial_stride):
        return vae.decode(z_BCTHW)
    return _in_parts(open_decoder(vae, limits), z_BCTHW, limits.max_frames // limits.temporal_stride)


def open_encoder(vae: CausalVae, limits: Vae) -> Stream:
    """A stream of pixels -> posterior parameters, in tiles where the config has them."""
    if not limits.tile:
        return EncodeStream(vae)
    grid = _grid(limits, encoder_margin(limits))
    return TiledStream(lambda: EncodeStream(vae), grid, limits.spatial_stride, 1)


def open_decoder(vae: CausalVae, limits: Vae) -> Stream:
    """A stream of raw latents -> pixels, in tiles where the config has them."""
    if not limits.tile:
        return DecodeStream(vae)
    grid = _grid(limits, decoder_margin(limits))
    return TiledStream(lambda: DecodeStream(vae), grid, 1, limits.spatial_stride)


def _grid(c: Vae, margin: int) -> Grid:
    """The overlap that is asked for in whole latents, or the one that makes tiles exact."""
    asked = margin if c.tile_overlap is None else -(-c.tile_overlap // c.spatial_stride)
    return Grid(c.tile // c.spatial_stride, asked, None if c.sees_whole_frames else margin)


def _fits(x: Tensor, c: Vae, frames: int, pixels: int) -> bool:
    """Whether a clip, with so many frames and pixels of a side for each of x, is within the limits."""
    last, side = (x.shape[2] - 1) * frames + 1, max(x.shape[-2:]) * pixels
    return (not c.max_frames or last <= c.max_frames) and (not c.tile or side <= c.tile)


def _in_parts(stream: Stream, x: Tensor, frames: int) -> Tensor:
    parts = [part for chunk in x.split(frames or x.shape[2], dim=2) if (part := stream.push(chunk)) is not None]
    stream.finish()
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
