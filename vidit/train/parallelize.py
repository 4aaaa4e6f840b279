"""From a config to a model that is ready to train: the one place where model and layout meet.

The order is fixed: build on meta, checkpoint activations, compile blocks, materialise, initialise.
"""

import torch
from torch import nn

from vidit.config import RunConfig
from vidit.model.block import Block
from vidit.model.dit import DiT
from vidit.model.init import initialise
from vidit.resolve import resolve
from vidit.text.encoder import TextEncoder
from vidit.train.recompute import recompute
from vidit.vae.autoencoder import CausalVae
from vidit.vae.layers import ResBlock


def build_dit(config: RunConfig, text: TextEncoder, device: torch.device, dtype: torch.dtype) -> nn.ModuleDict:
    """The denoiser, and beside it the text encoder where that is trained too: {"dit", "text"}."""
    with torch.device("meta"):
        dit = DiT(config.model, config.vae.latent_channels, resolve(config).grid, text.width)
    dit.dtype = dtype
    model = nn.ModuleDict({"dit": dit})
    if text.trainable:
        model["text"] = text
    return finish(model, config, device)


def build_vae(config: RunConfig, device: torch.device, dtype: torch.dtype) -> nn.ModuleDict:
    """The autoencoder to be trained: {"vae"}."""
    with torch.device("meta"):
        vae = CausalVae(config.vae)
    vae.dtype = dtype
    return finish(nn.ModuleDict({"vae": vae}), config, device)


def finish(model: nn.ModuleDict, config: RunConfig, device: torch.device) -> nn.ModuleDict:
    """Apply what the layout asks for, then give the parameters memory and values."""
    for module in model.modules():
        if isinstance(module, Block | ResBlock):
            if config.train.activation_checkpointing != "none":
                recompute(module, config.train.activation_checkpointing)
            if config.train.compile:
                module.compile()
    model.to_empty(device=device)
    initialise(model, config.train.seed)
    for module in model.modules():
        if isinstance(module, CausalVae):
            module.latent_mean.zero_()
            module.latent_std.fill_(1)
    return model
