"""Sampling a finished or running run: its newest checkpoint's averaged weights -> mp4 and gif files."""

import io
import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from parallel import checkpoint
from vidit.config import ConfigError, RunConfig, refuse
from vidit.data.encode import encode_mp4, write_gif
from vidit.overrides import apply_overrides, field_names
from vidit.resolve import faults, grid_of
from vidit.sample.draw import draw
from vidit.sample.given import first_latent, read_first
from vidit.text.encoder import TextEncoder, build_text_encoder
from vidit.train.parallelize import build_dit
from vidit.train.precision import choose_device, choose_dtype
from vidit.train.rundir import alone, read_config
from vidit.train.step import DitStep
from vidit.vae.store import load_vae
from vidit.whole_file import full_disk_explained, write_whole

# What acts when sampling. The captions come with the request, everything else is in the weights.
SAMPLING = (
    "sample.sampler", "sample.num_steps", "sample.guidance", "sample.guidance_rescale", "sample.motion_guidance",
    "sample.reconstruction_guidance", "sample.micro_batch",
    "model.attention_backend", "unet.attention_backend",
    "data.num_frames", "data.height", "data.width", "data.fps", "train.device", "train.precision",
    "diffusion.shift", "diffusion.shift_value", "model.guidance", "vae.max_frames", "vae.tile", "vae.tile_overlap",
)  # fmt: skip
MAX_STEM_BYTES = 120


@dataclass
class TrainedRun:
    """A run, ready to be sampled."""

    config: RunConfig
    step: DitStep
    model: nn.ModuleDict
    text: TextEncoder
    trained_steps: int

    def draw(self, prompts: Sequence[str], seed: int, first: Tensor | None = None) -> list[Tensor]:
        """One video (T, H, W, 3) uint8 for each prompt, each beginning with the frames `first` (F, H, W, 3), if any."""
        latent = None if first is None else first_latent(self.config, self.step, first)
        return draw(self.config, self.step, self.model, self.text, prompts, seed, latent)


def open_trained(run_dir: Path, overrides: Sequence[str] = ()) -> TrainedRun:
    """Load a run's newest checkpoint. ValueError where there is none; ConfigError with every fault of the request."""
    trained = alone(read_config(run_dir))
    found = checkpoint.steps(run_dir / "checkpoints")
    if trained.train.task == "vae" or not found:
        raise ValueError(f"{run_dir} holds no checkpoint of a denoiser to sample from; train it with `vidit train`")
    config = requested(trained, overrides)
    device = choose_device(config.train.device)
    dtype = choose_dtype(config.train.precision, device)
    vae = load_vae(run_dir / "vae", device, dtype)
    text = build_text_encoder(config.text, dtype, config.model.interleaves_text).to(device)
    asked = trained.model_copy(update={"model": config.model, "unet": config.unet})
    model = build_dit(asked, text, device, dtype).eval()
    # What is frozen has no average.
    named = {f"{'ema' if p.requires_grad else 'model'}.{name}": p.data for name, p in model.named_parameters()}
    checkpoint.load(checkpoint.folder_of(run_dir / "checkpoints", found[-1]), named, prefix="ema.")
    model.requires_grad_(False)
    return TrainedRun(config, DitStep(config, vae, text, device), model, text, found[-1])


def requested(trained: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The config of a run as a request changes it; raises ConfigError with all that cannot be met."""
    config, known, found = trained, set(field_names()), []
    for text in overrides:
        key = text.partition("=")[0]
        if key in known and key not in SAMPLING:
            found.append(f"{text}: {key} does not act when sampling; only {', '.join(SAMPLING)} do")
            continue
        try:
            config = apply_overrides(config, [text])
        except ConfigError as error:
            found += error.faults
    found += [*faults(config), *_table_faults(trained, config)]
    asked, told = config.model.guidance, trained.model.guidance
    if bool(asked) != bool(told):
        found.append(
            f"model.guidance={asked:g} of a model that was trained with {told:g}: "
            + ("it has to be told a scale; use one above 0" if told else "it takes no scale; use sample.guidance")
        )
    refuse(found)
    return config


def _table_faults(trained: RunConfig, config: RunConfig) -> Iterator[str]:
    """Sizes above the model's position tables, which have the size of the training clips."""
    u, is_unet = trained.unet, trained.train.task == "unet"
    if is_unet and not (u.has_self_attention and u.temporal_position == "bias"):
        return
    if not is_unet and trained.model.absolute_position != "learned":
        return
    sides = ("num_frames",) if is_unet else ("num_frames", "height", "width")
    cure = "unet.temporal_position=sinusoid" if is_unet else "model.absolute_position=false"
    asked_grid, most_grid = (grid_of(c, c.data.num_frames, c.data.height, c.data.width) for c in (config, trained))
    for name, asked, most in zip(sides, asked_grid, most_grid, strict=False):
        if asked > most:
            size = getattr(trained.data, name)
            yield (
                f"data.{name}={getattr(config.data, name)} is {asked} tokens, but the position table holds {most}, for "
                f"data.{name}={size} in training; sample at most {size}, or train with {cure}"
            )


def sample_run(
    run_dir: Path,
    prompts: Sequence[str],
    out: Path,
    seed: int,
    overrides: Sequence[str],
    first: Path | None = None,
    num_first: int = 1,
) -> Iterator[Path]:
    """Write one mp4 and one gif for each prompt, beside what is there; yields their paths.

    Each video begins with the first `num_first` frames of the file `first`, where there is one.
    """
    trained = open_trained(run_dir, overrides)
    frames = None if first is None else read_first(trained.config, first, num_first)
    fps = trained.config.data.shown_fps
    with full_disk_explained(out):
        out.mkdir(parents=True, exist_ok=True)
        videos = trained.draw(prompts, seed, frames)
        for number, (prompt, video) in enumerate(zip(prompts, videos, strict=True)):
            mp4, gif = _unused(out, f"{seed}-{number}-{stem_of(prompt)}")
            write_whole(mp4, encode_mp4(video.numpy(), fps))
            picture = io.BytesIO()
            write_gif(picture, video.numpy(), fps, scale=max(1, 256 // video.shape[1]))
            write_whole(gif, picture.getvalue())
            yield mp4
            yield gif


def stem_of(prompt: str) -> str:
    """A prompt as part of a file name: the letters and digits of every script, the rest as single dashes."""
    kept = [c if unicodedata.category(c)[0] in "LMN" else "-" for c in unicodedata.normalize("NFC", prompt).lower()]
    short = re.sub("-+", "-", "".join(kept)).strip("-")[:60]
    # A file name holds 255 bytes, and a letter has up to four.
    return short.encode()[:MAX_STEM_BYTES].decode(errors="ignore").strip("-") or "empty"


def _unused(out: Path, stem: str) -> tuple[Path, Path]:
    """The mp4 and the gif of this name, with a number added where one of them is there already."""
    for number in itertools.count(1):
        name = stem if number == 1 else f"{stem}-{number}"
        mp4, gif = out / f"{name}.mp4", out / f"{name}.gif"
        if not mp4.exists() and not gif.exists():
            return mp4, gif
    raise AssertionError("the numbers do not end")
