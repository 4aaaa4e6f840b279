"""Videos from a denoiser: prompts and a seed -> uint8 frames.

A sample is keyed by (seed, its number): the same request gives the same video, up to rounding whatever the
micro-batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn

from vidit import keys
from vidit.config import Bucket, RunConfig
from vidit.diffusion.guidance import guided, reconstructing
from vidit.diffusion.samplers import sample
from vidit.model.context import TextContext
from vidit.model.windows import Grid
from vidit.resolve import grid_of, resolve
from vidit.text.encoder import TextEncoder
from vidit.train.step import DitStep, TextInputs, beside, row_text
from vidit.vae.coding import decode_clip


@torch.no_grad()
def draw(
    config: RunConfig,
    step: DitStep,
    model: nn.ModuleDict,
    text: TextEncoder,
    prompts: Sequence[str],
    seed: int,
    first: Tensor | None = None,
) -> list[Tensor]:
    """One video (T, H, W, 3) uint8 on the CPU for each prompt, of the size and frame rate that `config.data` gives.

    `first` are the latent frames (1, C, f, H, W) with which each begins (`vidit/sample/given.py`).
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
        latent = draw_latents(config, step, model, text, chunk, noise, first)
        pixels = decode_clip(step.vae, step.vae.unwhiten(latent.float()), config.vae)
        frames = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        videos += [video.contiguous() for video in rearrange(frames, "n c t h w -> n t h w c").cpu()]
    assert all(v.shape == (d.num_frames, d.height, d.width, 3) for v in videos)
    return videos


@torch.no_grad()
def draw_latents(
    config: RunConfig,
    step: DitStep,
    model: nn.ModuleDict,
    text: TextEncoder,
    prompts: Sequence[str],
    noise: Tensor,
    first: Tensor | None = None,
) -> Tensor:
    """Whitened latents of as many prompts as there is standard normal noise, both (B, C, T, H, W)."""
    s, path = config.sample, step.objective.path
    condition, empty = (_conditions(step, text, said) for said in (list(prompts), [""] * len(prompts)))
    still = None
    if s.motion_guidance != 1:
        at_rest = torch.ones(len(prompts), dtype=torch.bool, device=step.device)
        condition, empty = ({**part, "still": ~at_rest} for part in (condition, empty))
        still = {**empty, "still": at_rest}
    denoise = guided(
        _Denoiser(config, step, model, first), condition, empty, s.guidance, rescale=s.guidance_rescale, still=still,
        motion=s.motion_guidance,
    )  # fmt: skip
    pulled = first is not None and s.reconstruction_guidance > 0
    if first is not None and pulled:
        denoise = reconstructing(denoise, path, first.to(noise), s.reconstruction_guidance)
    latent = sample(s.sampler, denoise, path, noise, path.sampling_times(s.num_steps, step.shift))
    return begun(latent, first if pulled or config.model.frame_times else None)


def _conditions(step: DitStep, text: TextEncoder, prompts: list[str]) -> dict[str, Tensor]:
    inputs = row_text(text(text.tokenize(prompts).to(step.device)), len(prompts), step.images_per_row)
    found = {"text": inputs.features_BLE, "frame": inputs.frame_BL, "pooled": inputs.pooled_BE}
    if inputs.second is not None and inputs.second.frame_BL is not None:
        found |= {"second": inputs.second.features_BLD, "second_frame": inputs.second.frame_BL}
    return found


def _said(condition: Mapping[str, Tensor]) -> TextInputs:
    """The inverse."""
    second = TextContext(condition["second"], condition["second_frame"]) if "second" in condition else None
    return TextInputs(condition["text"], condition["frame"], condition["pooled"], second)


def begun(x: Tensor, first: Tensor | None) -> Tensor:
    """Latents (B, C, T, H, W) with the given frames (1, C, f, H, W) in front."""
    return x if first is None else torch.cat((first.to(x).expand(len(x), -1, -1, -1, -1), x[:, :, first.shape[2] :]), 2)


class _Denoiser:
    """x_hat for the samplers; with self-conditioning, each call is given the estimate of the one before.

    Frames that are given are seen as in training: clean at time 0 in the place of noisy ones, or beside them.
    """

    def __init__(self, config: RunConfig, step: DitStep, model: nn.ModuleDict, first: Tensor | None = None):
        d, m = config.data, config.model
        self.first, self.beside = first if m.frame_times else None, first if m.given_channels else None
        self.step, self.model = step, model
        shape = Bucket(num_frames=d.num_frames, height=d.height, width=d.width)
        self.tokens, self.fps = grid_of(config, d.num_frames, d.height, d.width), shape.rate(d.shown_fps)
        self.previous: Tensor | None = None

    def __call__(self, x: Tensor, t_B: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        text = _said(condition)
        t_B = t_B.to(self.step.device)
        grid = Grid(*self.tokens, fps_B=self.step.frame_rates([self.fps] * len(x)), still_B=condition.get("still"))
        if self.beside is not None:
            given_BT = torch.arange(x.shape[2], device=x.device).expand(len(x), -1) < self.beside.shape[2]
            grid = replace(grid, given_BCTHW=beside(begun(torch.zeros_like(x), self.beside), given_BT))
        x, told = begun(x, self.first), t_B
        if self.first is not None:
            told = t_B[:, None].repeat(1, x.shape[2])
            told[:, : self.first.shape[2]] = 0
        output = self.step.denoise(self.model, x, told, text, grid, self.previous)
        x_hat = begun(self.step.objective.denoised(output, x, t_B), self.first)
        if self.step.config.denoiser.self_conditioning:
            self.previous = x_hat.detach().to(self.step.dtype)
        return x_hat
