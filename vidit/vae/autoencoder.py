"""Encoder, decoder and the KL latent between them.

(B, 3, 1 + T, H, W) in [-1, 1] <-> (B, c, 1 + T/s_t, H/s, W/s), with a diagonal Gaussian posterior (Kingma &
Welling, 1312.6114). The per-channel mean and std of the training latents are part of the weights: the model
is trained on whitened latents, and raw ones are what is stored (W.A.L.T., section 3.1; EDM2).
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from vidit.config import Vae
from vidit.dtypes import widen
from vidit.vae.folding import Fold, Unfold
from vidit.vae.layers import CausalConv3d
from vidit.vae.levels import decoder_levels, encoder_levels
from vidit.vae.norms import build_norm, silu

# Where the log variance starts: a first latent that drowns in noise of variance 1 teaches the decoder nothing.
LOG_VARIANCE = -6.0


class Posterior(NamedTuple):
    """q(z | x): mean and log variance, both (B, c, T, H, W), fp32 (fp64 where the VAE computes in that)."""

    mean: Tensor
    log_variance: Tensor

    def kl(self) -> Tensor:
        """KL to the standard normal, mean over everything, in nats a latent number."""
        return 0.5 * (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance).mean()


class Encoder(nn.Module):
    """Pixels -> posterior parameters (B, 2c, T, H, W). A shortcut adds means of channels, but with `vae.layers=ldm`."""

    def __init__(self, c: Vae):
        super().__init__()
        finest, coarsest = c.base_channels * c.multipliers[0], c.base_channels * c.multipliers[-1]
        self.shortcut = c.layers == "residual"
        self.fold = Fold(c)
        self.first = CausalConv3d(c.folded_channels, finest)
        self.layers = encoder_levels(c)
        self.norm = build_norm(c, coarsest)
        self.last = CausalConv3d(coarsest, 2 * c.latent_channels, kernel=1 if self.shortcut else 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers(self.first(self.fold(x)))
        mean, log_variance = self.last(silu(self.norm(h))).chunk(2, dim=1)
        if self.shortcut:
            mean = mean + h.unflatten(1, (mean.shape[1], -1)).mean(2)
        return torch.cat((mean, log_variance + LOG_VARIANCE), dim=1)


class Decoder(nn.Module):
    """Latent -> pixels (B, 3, T, H, W), about [-1, 1].

    A shortcut repeats the latent's channels; with `vae.layers=ldm` there is none, and a matrix over them comes first.
    That is no part of the convolution behind it, whose zeros around a frame know nothing of the matrix's bias.
    """

    def __init__(self, c: Vae):
        super().__init__()
        finest, coarsest = c.base_channels * c.multipliers[0], c.base_channels * c.multipliers[-1]
        self.mix = CausalConv3d(c.latent_channels, c.latent_channels, kernel=1) if c.layers == "ldm" else None
        self.first = CausalConv3d(c.latent_channels, coarsest)
        self.repeats = coarsest // c.latent_channels
        self.layers = decoder_levels(c)
        self.norm = build_norm(c, finest)
        self.last = CausalConv3d(finest, c.folded_channels)
        self.unfold = Unfold(c)

    def forward(self, z: Tensor) -> Tensor:
        if self.mix is None:
            begun = self.first(z) + z.repeat_interleave(self.repeats, dim=1)
        else:
            begun = self.first(self.mix(z))
        h = self.layers(begun)
        return cast(Tensor, self.unfold(self.last(silu(self.norm(h)))))


def posterior(parameters_BCTHW: Tensor) -> Posterior:
    """What the encoder gives, (B, 2c, T, H, W), as a posterior."""
    mean, log_variance = widen(parameters_BCTHW).chunk(2, dim=1)
    return Posterior(mean, log_variance.clamp(-30, 20))


class Autoencoder(nn.Module):
    """What a run needs of a VAE, whoever made it: coding, latent statistics, sizes. Pixels are in [-1, 1].

    `dtype` is that it computes in; posteriors and pixels are at least fp32.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, c: Vae):
        super().__init__()
        self.config = c
        self.dtype = torch.float32
        self.register_buffer("latent_mean", torch.zeros(c.latent_channels))
        self.register_buffer("latent_std", torch.ones(c.latent_channels))

    def encode(self, x_BCTHW: Tensor) -> Posterior:
        """Raw posterior of pixels (B, 3, frames, H, W); ValueError for a size that the strides do not divide."""
        raise NotImplementedError

    def decode(self, z_BCTHW: Tensor) -> Tensor:
        """Raw latent -> pixels (B, 3, frames, H, W)."""
        raise NotImplementedError

    def identity(self) -> tuple[nn.Module, torch.dtype]:
        """What decides the latents, and a dtype in which its weights are the same wherever they are loaded."""
        raise NotImplementedError

    def whiten(self, z_BCTHW: Tensor) -> Tensor:
        """Raw latent -> zero mean, unit variance in each channel."""
        shape = (1, -1, 1, 1, 1)
        return (z_BCTHW - self.latent_mean.view(shape)) / self.latent_std.view(shape)

    def unwhiten(self, z_BCTHW: Tensor) -> Tensor:
        """The inverse of `whiten`."""
        shape = (1, -1, 1, 1, 1)
        return z_BCTHW * self.latent_std.view(shape) + self.latent_mean.view(shape)

    def check_size(self, shape: torch.Size) -> None:
        """ValueError for pixels of a shape (..., frames, height, width) that the strides do not divide."""
        frames, height, width = shape[-3:]
        s, t, unit = self.config.spatial_stride, self.config.temporal_stride, self.config.frames_unit
        if height % s or width % s or (frames - 1) % unit:
            raise ValueError(
                f"a video of {frames} frames of {height}x{width} does not fit the VAE's strides {t}x{s}x{s}: "
                f"frames must be 1 + a multiple of {unit}, height and width multiples of {s}"
            )


class CausalVae(Autoencoder):
    """The causal 3D VAE; parameters are filled by `initialise`."""

    def __init__(self, c: Vae):
        super().__init__(c)
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)

    def identity(self) -> tuple[nn.Module, torch.dtype]:
        return self.encoder, torch.float32

    def encode(self, x_BCTHW: Tensor) -> Posterior:
        """Raw posterior of pixels (B, 3, 1 + T, H, W); ValueError for a size that the strides do not divide."""
        self.check_size(x_BCTHW.shape)
        return posterior(self.encoder(x_BCTHW.to(self.dtype)))

    def decode(self, z_BCTHW: Tensor) -> Tensor:
        """Raw latent -> pixels, fp32 (fp64 where the VAE computes in that)."""
        return widen(self.decoder(z_BCTHW.to(self.dtype)))
