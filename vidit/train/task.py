"""What `train.task` decides: the model, the step function, and what needs the text or the frozen VAE."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vidit.config import RunConfig
from vidit.model.flops import forward_flops, training_flops
from vidit.resolve import resolve
from vidit.text.encoder import CaptionTokenizer, TextEncoder, build_text_encoder
from vidit.train.parallelize import build_dit, build_vae
from vidit.train.precision import choose_dtype
from vidit.train.rundir import keep_vae
from vidit.train.step import DitStep, Step, VaeStep
from vidit.vae.store import load_vae


@dataclass
class Task:
    """A run's own part of the training loop. `forward_flops` is of one clip, None where nobody has counted."""

    config: RunConfig
    model: nn.ModuleDict
    step: Step
    text: TextEncoder | None
    forward_flops: int | None

    @property
    def tokenizer(self) -> CaptionTokenizer | None:
        return self.text.tokenizer if self.text else None

    @property
    def flops_per_step(self) -> float | None:
        """Of one optimizer step, over all rows of the global batch."""
        if self.forward_flops is None:
            return None
        c = self.config
        return training_flops(self.forward_flops, c.model.self_conditioning) * c.train.global_batch


def build_task(config: RunConfig, device: torch.device, num_validation: int | None = None) -> Task:
    """Model and step of `train.task`, on the device, with initial weights."""
    dtype = choose_dtype(config.train.precision, device)
    if config.train.task == "vae":
        return Task(config, build_vae(config, device, dtype), VaeStep(config, device), None, None)
    config = keep_vae(config)
    vae = load_vae(Path(config.vae.weights or ""), device, dtype)
    text = build_text_encoder(config.text, dtype)
    model = build_dit(config, text, device, dtype)
    if not text.trainable:
        text.to(device)
    flops = forward_flops(config.model, resolve(config).grid, config.vae.latent_channels, text.width, text.max_tokens)
    return Task(config, model, DitStep(config, vae, text, device, num_validation), text, flops)
