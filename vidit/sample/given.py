"""How a video begins: frames of a file that a model continues.

One that was trained so (`diffusion.given`) knows what the time 0 of a frame means (`model.frame_times`), or sees them
beside the noise (`given_channels`); any other is pulled towards them (`sample.reconstruction_guidance`). The frames are
coded by the VAE on their own, which is what it would make of them in the whole clip: it is causal.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vidit.config import ConfigError, RunConfig
from vidit.data.limits import ClipError
from vidit.data.video import decode_clip
from vidit.train.step import DitStep, to_pixels
from vidit.vae.coding import encode_clip

IMAGES = (".png", ".jpg", ".jpeg", ".webp")


def read_first(config: RunConfig, path: Path, num_frames: int) -> Tensor:
    """The first frames of a video, or an image, at the size and frame rate of a request: (F, H, W, 3) uint8.

    Raises ConfigError where the model cannot be given them, ValueError for a file that does not show so many.
    """
    d, unit = config.data, config.vae.frames_unit
    if not (config.model.frame_times or config.model.given_channels or config.sample.reconstruction_guidance):
        raise ConfigError(
            [f"--first={path} gives frames to a model that was not trained for it; train with model.frame_times=true "
             "or given_channels=true, and diffusion.given, or sample with sample.reconstruction_guidance=9"]
        )  # fmt: skip
    if not config.vae.first_frame_alone:
        raise ConfigError(
            [f"--first={path} needs a causal VAE, and {config.vae.kind} codes frames with those after them"]
        )
    if d.num_frames <= 1:
        raise ConfigError([f"--first={path} begins a video, but data.num_frames={d.num_frames}; use more frames"])
    if (num_frames - 1) % unit or num_frames >= d.num_frames:
        most = 1 + (d.num_frames - 2) // unit * unit
        raise ConfigError(
            [f"--first-frames={num_frames} is not 1 + a multiple of {unit} below data.num_frames={d.num_frames}; use 1 "
             f"to {most} in steps of {unit}"]
        )  # fmt: skip
    if path.suffix.lower() in IMAGES and num_frames == 1:
        return _read_image(path, (d.width, d.height))[None]
    try:
        return decode_clip(
            path, num_frames=num_frames, fps=d.fps if num_frames > 1 else None, height=d.height, width=d.width,
            start_fraction=0.0,
        )  # fmt: skip
    except ClipError as error:
        raise ValueError(f"{path} cannot begin a video: {error}") from error


def _read_image(path: Path, size: tuple[int, int]) -> Tensor:
    """The middle of an image, upright, as large as covers the size (width, height): (H, W, 3) uint8."""
    try:
        with Image.open(path) as image:
            shown = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot begin a video: {error}") from error
    return torch.from_numpy(np.array(ImageOps.fit(shown, size, Image.Resampling.BICUBIC)))


@torch.no_grad()
def first_latent(config: RunConfig, step: DitStep, frames_FHW3: Tensor) -> Tensor:
    """Those frames as the model's first latent frames: whitened (1, C, f, H, W)."""
    mean = encode_clip(step.vae, to_pixels(frames_FHW3[None], step.device), config.vae).mean
    return step.vae.whiten(mean).to(step.dtype)
