"""The end of a VAE run: latent statistics, and the weights as a folder that a DiT run can use."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from vidit.config import RunConfig
from vidit.data.loader import Batch
from vidit.train.ema import Ema
from vidit.train.step import to_pixels
from vidit.vae.autoencoder import CausalVae
from vidit.vae.store import save_vae


@torch.no_grad()
def finish_vae(config: RunConfig, model: nn.ModuleDict, ema: Ema, data: Sequence[Batch], folder: Path) -> None:
    """Measure mean and std of each latent channel over `data` with the averaged weights, and export those.

    W.A.L.T. normalises latents before the transformer (section 3.1); the statistics travel in the weights.
    """
    vae = model["vae"]
    assert isinstance(vae, CausalVae)
    ema.swap(model)
    try:
        device = vae.latent_mean.device
        latents = []
        for batch in data:
            assert batch.clips.pixels is not None
            latents.append(vae.encode(to_pixels(batch.clips.pixels, device)).mean)
        z = torch.cat(latents).transpose(0, 1).flatten(1)
        vae.latent_mean.copy_(z.mean(1))
        vae.latent_std.copy_(z.std(1))
        save_vae(folder, vae, half=config.vae.half_weights)
    finally:
        ema.swap(model)
