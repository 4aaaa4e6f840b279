"""Videos from a denoiser: prompts and a seed -> uint8 frames.

A sample is keyed by (seed, its number): the same request gives the same video, up to rounding whatever the
micro-batch.
"""

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from vidit import keys
from vidit.config import RunConfig
from vidit.diffusion.guidance import guided
from vidit.diffusion.samplers import sample
from vidit.model.windows import Grid
from vidit.resolve import grid_of, resolve
from vidit.text.encoder import TextEncoder
from vidit.train.step import DitStep, TextInputs, row_text
from vidit.vae.coding import decode_clip


@torch.no_grad()
def draw(
    config: RunConfig, step: DitStep, model: nn.ModuleDict, text: TextEncoder, prompts: Sequence[str], seed: int
) -> list[Tensor]:
    """One video (T, H, W, 3) uint8 on the CPU for each prompt, of the size and frame rate that `config.data` gives.

    Raises ConfigError for a size that the VAE's strides and the patch do not divide.
    """
    d, s = config.data, config.sample
    r = resolve(config)
    shape = (config.vae.latent_channels, r.latent_frames, r.latent_height, r.latent_width)
    videos: list[Tensor] = []
    for start in range(0, len(prompts), s.micro_batch):
        chunk = list(prompts[start : start + s.micro_batch])
        numbers = list(range(start, start + len(chunk)))
        noise = keys.normal(shape, seed, "sample", numbers).to(step.device, step.dtype)
        latent = draw_latents(config, step, model, text, chunk, noise)
        pixels = decode_clip(step.vae, step.vae.unwhiten(latent.float()), config.vae)
        frames = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        videos += [video.contiguous() for video in rearrange(frames, "n c t h w -> n t h w c").cpu()]
    assert all(v.shape == (d.num_frames, d.height, d.width, 3) for v in videos)
    return videos


@torch.no_grad()
def draw_latents(
    config: RunConfig, step: DitStep, model: nn.ModuleDict, text: TextEncoder, prompts: Sequence[str], noise: Tensor
) -> Tensor:
    """Whitened latents of as many prompts as there is standard normal noise, both (B, C, T, H, W)."""
    s, path = config.sample, step.objective.path
    condition, empty = (_conditions(step, text, said) for said in (list(prompts), [""] * len(prompts)))
    denoise = guided(_Denoiser(config, step, model), condition, empty, s.guidance, rescale=s.guidance_rescale)
    return sample(s.sampler, denoise, path, noise, path.sampling_times(s.num_steps, step.shift))


def _conditions(step: DitStep, text: TextEncoder, prompts: list[str]) -> dict[str, Tensor]:
    inputs = row_text(text(text.tokenize(prompts).to(step.device)), len(prompts), step.images_per_row)
    return {"text": inputs.features_BLE, "frame": inputs.frame_BL, "pooled": inputs.pooled_BE}


class _Denoiser:
    """x_hat for the samplers; with self-conditioning, each call is given the estimate of the one before."""

    def __init__(self, config: RunConfig, step: DitStep, model: nn.ModuleDict):
        d = config.data
        self.step, self.model = step, model
        self.tokens, self.fps = grid_of(config, d.num_frames, d.height, d.width), d.shown_fps
        self.previous: Tensor | None = None

    def __call__(self, x: Tensor, t_B: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        text = TextInputs(condition["text"], condition["frame"], condition["pooled"])
        t_B = t_B.to(self.step.device)
        grid = Grid(*self.tokens, fps_B=self.step.frame_rates([self.fps] * len(x)))
        output = self.step.denoise(self.model, x, t_B, text, grid, self.previous)
        x_hat = self.step.objective.denoised(output, x, t_B)
        if self.step.config.denoiser.self_conditioning:
            self.previous = x_hat.to(self.step.dtype)
        return x_hat
