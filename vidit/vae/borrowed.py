"""A frozen VAE of diffusers as this project's autoencoder: the same calls, latents raw, statistics beside them.

AutoencoderKL (Rombach et al., arXiv 2112.10752; frame by frame), AutoencoderKLCogVideoX (Yang et al., arXiv
2408.06072), AutoencoderKLHunyuanVideo (Kong et al., arXiv 2412.03603) and AutoencoderKLWan (Wan team, arXiv
2503.20314). The class itself computes, with its own batches of frames: they belong to its numbers, for norms see all
frames of a batch. Whitened latents are those that the pipelines of diffusers give their transformers.

Safetensors only. diffusers is imported when a VAE is loaded, for it takes seconds.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from einops import rearrange
from safetensors import SafetensorError
from torch import Tensor, nn

from vidit.config import Vae
from vidit.dtypes import widen
from vidit.vae.autoencoder import Autoencoder, Posterior

FRAMES_AT_ONCE = 16
"""Of an image VAE, where the config has no `vae.max_frames`."""


class BorrowedVae(Autoencoder):
    """A class of diffusers, on the device and in the dtype that it computes in. `model` is its instance."""

    model: Any

    def __init__(self, c: Vae, model: nn.Module):
        super().__init__(c)
        self.model = model
        self.dtype = next(model.parameters()).dtype
        self.frames = FRAMES_AT_ONCE
        mean, std = statistics(c, self.model.config)
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def identity(self) -> tuple[nn.Module, torch.dtype]:
        # In bf16: the same whether the weights are held in that or in more.
        parts = {name: getattr(self.model, name, None) for name in ("encoder", "quant_conv")}
        return nn.ModuleDict({name: part for name, part in parts.items() if part is not None}), torch.bfloat16

    def limit(self, c: Vae) -> None:
        """Code in parts of `vae.tile` and `vae.max_frames` from now on."""
        self.frames = c.max_frames or FRAMES_AT_ONCE
        self.model.use_tiling = False
        if c.tile:
            _TILING[self.config.kind](self.model, c.tile, self.config.spatial_stride)

    @torch.no_grad()
    def encode(self, x_BCTHW: Tensor) -> Posterior:
        self.check_size(x_BCTHW.shape)
        x = x_BCTHW.to(self.dtype)
        if self.config.kind != "AutoencoderKL":
            found = self.model.encode(x).latent_dist
            return Posterior(widen(found.mean), widen(found.logvar))
        frames = rearrange(x, "b c t h w -> (b t) c h w").split(self.frames)
        parts = [self.model.encode(part).latent_dist for part in frames]
        mean, log_variance = (torch.cat([getattr(p, name) for p in parts]) for name in ("mean", "logvar"))
        return Posterior(*(_clips(widen(part), len(x)) for part in (mean, log_variance)))

    @torch.no_grad()
    def decode(self, z_BCTHW: Tensor) -> Tensor:
        z = z_BCTHW.to(self.dtype)
        if self.config.kind != "AutoencoderKL":
            return widen(cast(Tensor, self.model.decode(z).sample))
        frames = rearrange(z, "b c t h w -> (b t) c h w").split(self.frames)
        return _clips(widen(torch.cat([self.model.decode(part).sample for part in frames])), len(z))


def _clips(frames: Tensor, count: int) -> Tensor:
    return rearrange(frames, "(b t) c h w -> b c t h w", b=count)


def load_borrowed(folder: Path, c: Vae, device: torch.device, dtype: torch.dtype) -> BorrowedVae:
    """The VAE of a folder, frozen. ValueError for files that are damaged or do not match, RuntimeError without
    diffusers.
    """
    try:
        import diffusers
    except ImportError as error:
        raise RuntimeError(f"vae.weights={folder} is a {c.kind} of diffusers; pip install 'vidit[borrow]'") from error
    try:
        model, loading = getattr(diffusers, c.kind).from_pretrained(
            folder,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be read as a {c.kind}: {error}; copy its files again") from error
    # diffusers fills what is missing with random numbers.
    absent = sorted({*loading["missing_keys"], *map(str, loading["mismatched_keys"])})
    if absent:
        raise ValueError(
            f"{folder} lacks {len(absent)} weights of {c.kind}, among them {absent[0]}; the files are incomplete or "
            "belong to another model"
        )
    return BorrowedVae(c, model).to(device).eval().requires_grad_(False)


def statistics(c: Vae, facts: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean and std of raw latents, (c) each, so that (z - mean) / std is what the class's pipelines compute.

    With `scaling_factor` s: z s for CogVideoX and HunyuanVideo, (z - shift) s for AutoencoderKL (Flux, SD3), or
    (z - mean) s / std where it has both of each channel (SDXL). Wan has mean and std of each channel.
    """
    mean, std, shift = (facts.get(name) for name in ("latents_mean", "latents_std", "shift_factor"))
    scale = 1.0 if c.kind == "AutoencoderKLWan" else float(facts["scaling_factor"])
    if c.kind == "AutoencoderKLCogVideoX" and not (mean is std is shift is None):
        raise ValueError(
            f"{c.weights} of CogVideoX sets latents_mean, latents_std or shift_factor, which no pipeline of it reads; "
            "set them to null in its config.json"
        )
    if (mean is None) != (std is None) or (mean is not None and shift is not None):
        raise ValueError(f"{c.weights} gives one of latents_mean and latents_std, or shift_factor beside them; mend it")
    given = {
        "latents_mean": mean or [shift or 0.0] * c.latent_channels,
        "latents_std": std or [1.0] * c.latent_channels,
    }
    for name, values in given.items():
        if len(values) != c.latent_channels:
            raise ValueError(f"{c.weights} has {len(values)} numbers of {name} for {c.latent_channels} latent channels")
    return torch.tensor(given["latents_mean"]), torch.tensor(given["latents_std"]) / scale


# Tiles of every class overlap by a quarter: its own ratio, or one for which strides in pixels and latents agree.
def _tile_image(model: Any, tile: int, stride: int) -> None:
    model.use_tiling = True
    model.tile_sample_min_size, model.tile_latent_min_size, model.tile_overlap_factor = tile, tile // stride, 0.25


def _tile_cogvideox(model: Any, tile: int, stride: int) -> None:
    model.enable_tiling(tile, tile, 0.25, 0.25)


def _tile_video(model: Any, tile: int, stride: int) -> None:
    step = tile * 3 // 4
    model.enable_tiling(
        tile_sample_min_height=tile,
        tile_sample_min_width=tile,
        tile_sample_stride_height=step,
        tile_sample_stride_width=step,
    )


_TILING: dict[str, Callable[[Any, int, int], None]] = {
    "AutoencoderKL": _tile_image,
    "AutoencoderKLCogVideoX": _tile_cogvideox,
    "AutoencoderKLHunyuanVideo": _tile_video,
    "AutoencoderKLWan": _tile_video,
}
