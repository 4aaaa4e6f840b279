"""The end of a VAE run: latent statistics, and the weights as a folder that a DiT run can use."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from parallel.dtensor import full_tensors
from parallel.exchange import from_first
from vidit.config import RunConfig
from vidit.data.loader import Batch
from vidit.train.ema import Ema
from vidit.train.step import to_pixels
from vidit.vae.autoencoder import CausalVae
from vidit.vae.store import save_vae

# Training clips that the statistics are taken over: of a mean over that many latents only the third digit moves.
NUM_CLIPS = 256


@torch.no_grad()
def finish_vae(
    config: RunConfig,
    model: nn.ModuleDict,
    ema: Ema,
    data: Iterable[Batch],
    folder: Path,
    check: Callable[[], None],
) -> None:
    """Measure mean and std of each latent channel over `data` with the averaged weights, and export those.

    W.A.L.T. normalises latents before the transformer (section 3.1); the statistics travel in the weights. Those of an
    encoder that was not trained stay as they came, so that a DiT on its latents may have the new decoder.
    `check` may raise before each batch.
    """
    vae, measured = model["vae"], not config.vae_train.freeze_encoder
    assert isinstance(vae, CausalVae)
    with ema.applied(model):
        latents = []
        for batch in data if measured else ():
            check()
            assert batch.clips.pixels is not None
            latents.append(vae.encode(to_pixels(batch.clips.pixels, vae.latent_mean.device)).mean)
        if measured:
            z = torch.cat(latents).transpose(0, 1).flatten(1)
            vae.latent_mean.copy_(z.mean(1))
            vae.latent_std.copy_(z.std(1))
        full = full_tensors(vae.state_dict())
        from_first(lambda: save_vae(folder, vae, config.vae.half_weights, full))
