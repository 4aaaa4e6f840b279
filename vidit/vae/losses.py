"""The terms of an autoencoder's loss that need nothing but numbers; one number a row, (B,)."""

import torch
from einops import rearrange
from torch import Tensor

from vidit.vae.autoencoder import Posterior
from vidit.vae.folding import block_transform


def l1_rows(error_BCTHW: Tensor) -> Tensor:
    """Mean absolute error."""
    return error_BCTHW.abs().flatten(1).mean(1)


def l2_rows(error_BCTHW: Tensor) -> Tensor:
    """Mean squared error."""
    return error_BCTHW.square().flatten(1).mean(1)


def kl_rows(q: Posterior) -> Tensor:
    """KL to the standard normal in nats a latent number."""
    return 0.5 * (q.mean.square() + q.log_variance.exp() - 1 - q.log_variance).flatten(1).mean(1)


def psnr_rows(l2_B: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, from squared errors of pixels in [-1, 1], whose peak is 2."""
    return 10 * torch.log10(4 / l2_B)


def wavelet_rows(error_BCTHW: Tensor) -> Tensor:
    """Mean absolute value of what is high in frequency: the three Haar bands of 2x2 pixels that are no means, and the
    Haar band of neighbouring frames. Wavelets are linear, so those of the error are errors of wavelets.

    Height and width are even. An image has no bands in time.
    """
    blocks = rearrange(error_BCTHW, "b c t (h p) (w q) -> b c t h w (p q)", p=2, q=2)
    bands = blocks @ block_transform(1, 2).to(error_BCTHW).T
    high = bands[..., 1:].abs().flatten(1).mean(1)
    if error_BCTHW.shape[2] > 1:
        high = high + (error_BCTHW.diff(dim=2) / 2**0.5).abs().flatten(1).mean(1)
    return high
