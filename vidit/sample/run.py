"""Sampling a finished or running run: its newest checkpoint's averaged weights -> mp4 and gif files."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from parallel import checkpoint
from vidit.config import ConfigError, RunConfig, apply_overrides
from vidit.data.encode import encode_mp4, write_gif
from vidit.sample.draw import draw
from vidit.text.encoder import TextEncoder, build_text_encoder
from vidit.train.parallelize import build_dit
from vidit.train.precision import choose_device, choose_dtype
from vidit.train.rundir import read_config
from vidit.train.step import DitStep
from vidit.vae.store import load_vae

FREE_SECTIONS = ("sample.", "data.", "train.device=", "train.precision=", "diffusion.shift")


@dataclass
class TrainedRun:
    """A run, ready to be sampled."""

    config: RunConfig
    step: DitStep
    model: nn.ModuleDict
    text: TextEncoder
    trained_steps: int

    def draw(self, prompts: Sequence[str], seed: int) -> list[Tensor]:
        """One video (T, H, W, 3) uint8 for each prompt."""
        return draw(self.config, self.step, self.model, self.text, prompts, seed)


def open_trained(run_dir: Path, overrides: Sequence[str] = ()) -> TrainedRun:
    """Load a run's newest checkpoint. ValueError where there is none; ConfigError for an override of the model."""
    config = read_config(run_dir)
    free = ", ".join(name.removesuffix("=") if name.endswith("=") else f"{name}*" for name in FREE_SECTIONS)
    faults = [f"{text}: only {free} can change when sampling" for text in overrides
              if not text.startswith(FREE_SECTIONS)]  # fmt: skip
    if faults:
        raise ConfigError(faults)
    trained, config = config, apply_overrides(config, overrides)
    found = checkpoint.steps(run_dir / "checkpoints")
    if config.train.task != "dit" or not found:
        raise ValueError(f"{run_dir} holds no checkpoint of a DiT to sample from; train it with `vidit train`")
    check_size(config)
    device = choose_device(config.train.device)
    dtype = choose_dtype(config.train.precision, device)
    vae = load_vae(run_dir / "vae", device, dtype)
    text = build_text_encoder(config.text, dtype).to(device)
    model = build_dit(trained, text, device, dtype).eval()
    named = {f"ema.{name}": p.data for name, p in model.named_parameters() if p.requires_grad}
    checkpoint.load(checkpoint.folder_of(run_dir / "checkpoints", found[-1]), named)
    return TrainedRun(config, DitStep(config, vae, text, device), model, text, found[-1])


def check_size(config: RunConfig) -> None:
    """ValueError when the VAE's strides do not divide the size asked for, naming the nearest that they do."""
    d, v, p = config.data, config.vae, config.model.patch
    faults = []
    for name, stride in (("height", v.spatial_stride * p), ("width", v.spatial_stride * p)):
        size = getattr(d, name)
        if size % stride:
            low = size // stride * stride
            near = " or ".join(str(n) for n in (low, low + stride) if n)
            faults.append(f"data.{name}={size} is not divisible by VAE stride x patch = {stride}; use {near}")
    if (d.num_frames - 1) % v.temporal_stride:
        low = 1 + (d.num_frames - 1) // v.temporal_stride * v.temporal_stride
        faults.append(
            f"data.num_frames={d.num_frames} is not 1 + a multiple of the VAE's temporal stride {v.temporal_stride}; "
            f"use {low} or {low + v.temporal_stride}"
        )
    if faults:
        raise ConfigError(faults)


def sample_run(run_dir: Path, prompts: Sequence[str], out: Path, seed: int, overrides: Sequence[str]) -> Iterator[Path]:
    """Write one mp4 and one gif for each prompt; yields their paths."""
    trained = open_trained(run_dir, overrides)
    fps = trained.config.data.fps or 8.0
    out.mkdir(parents=True, exist_ok=True)
    for number, (prompt, video) in enumerate(zip(prompts, trained.draw(prompts, seed), strict=True)):
        stem = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "empty"
        mp4, gif = out / f"{seed}-{number}-{stem}.mp4", out / f"{seed}-{number}-{stem}.gif"
        mp4.write_bytes(encode_mp4(video.numpy(), fps))
        write_gif(gif, video.numpy(), fps, scale=max(1, 256 // video.shape[1]))
        yield mp4
        yield gif
