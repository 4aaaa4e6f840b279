"""How well does a trained VAE reconstruct clips that it was not trained on? Numbers, and a picture of pairs.

PSNR and SSIM of each clip; the run's own perceptual distance, where it was trained with one; and the Frechet distance
between clips and reconstructions over the features of a network that is given. The posterior's mean is decoded, as a
DiT's training and sampling do.
"""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vidit.config import RunConfig
from vidit.data.shards import ClipRef
from vidit.evaluate.frechet import features_of, frechet_distance
from vidit.evaluate.picture_quality import psnr_rows, sharpness_rows, ssim_rows
from vidit.train.clips import every_clip, fixed_batches, read_splits
from vidit.train.costs import costed
from vidit.train.precision import choose_device
from vidit.train.rundir import alone, newest_checkpoint, read_config
from vidit.train.step import to_pixels
from vidit.vae.autoencoder import Autoencoder
from vidit.vae.perceptual import SceneFeatures, load_perceptual
from vidit.vae.store import load_vae
from vidit.whole_file import full_disk_explained, write_whole

SHOWN = 6
"""Clips in the picture."""


def evaluate_vae(run_dir: Path, num_clips: int, data: str | None = None, features: str | None = None) -> dict[str, Any]:
    """Write RUN/reconstruction.json and RUN/reconstruction.png; returns the former's content.

    Args:
        num_clips: at most so many, the first ones of `data` or of the run's validation.
        data: a packed folder.
        features: weights of `SceneFeatures`, for the Frechet distance.

    Raises ValueError where the run is not done, or has no clips to look at.
    """
    config = alone(read_config(run_dir))
    newest, folder = newest_checkpoint(run_dir), run_dir / "vae"
    if newest is None or not (folder / "model.safetensors").is_file():
        raise ValueError(f"{run_dir} holds no trained VAE yet; run `vidit train` to its end")
    refs = _refs(config, data)[:num_clips]
    device = choose_device(config.train.device)
    with full_disk_explained(run_dir), costed(run_dir, "evaluate") as start:
        start.step = int(newest.name.removeprefix("step-"))
        vae = load_vae(folder, device, torch.float32)
        found = judged(vae, list(pairs(config, vae, refs)), config, features)
        found = {"steps": start.step, "clips": len(refs), "of": data or "validation"} | found
        write_whole(run_dir / "reconstruction.json", json.dumps(found, indent=1) + "\n")
        shown = list(pairs(config, vae, refs[:SHOWN]))
        write_whole(run_dir / "reconstruction.png", picture(*(torch.cat(part) for part in zip(*shown, strict=True))))
    return found


def _refs(config: RunConfig, data: str | None) -> Sequence[ClipRef]:
    if data is None:
        refs = read_splits(config)[1].refs
        if not len(refs):
            raise ValueError("the run was trained without validation clips; give others as --data")
        return refs
    other = config.data.model_copy(
        update={"train": data, "validation": None, "num_validation": 0, "mixture": (), "select": (), "buckets": ()}
    )
    return every_clip(config.model_copy(update={"data": other})).refs


@torch.no_grad()
def pairs(config: RunConfig, vae: Autoencoder, refs: Sequence[ClipRef]) -> Iterator[tuple[Tensor, Tensor]]:
    """Clips and their reconstructions in batches, both (B, 3, T, H, W) in [-1, 1] on the CPU."""
    for batch in fixed_batches(config, refs, len(refs), None, 1):
        assert batch.clips.pixels is not None
        x = to_pixels(batch.clips.pixels, vae.latent_mean.device)
        yield x.cpu(), vae.decode(vae.encode(x).mean).clamp(-1, 1).cpu()


@torch.no_grad()
def judged(
    vae: Autoencoder, batches: Sequence[tuple[Tensor, Tensor]], config: RunConfig, features: str | None
) -> dict[str, Any]:
    """Every measure of the pairs, in the mean over clips."""
    t = config.vae_train
    measures = {"psnr_db": psnr_rows, "ssim": ssim_rows}
    found: dict[str, Any] = {name: _mean([measure(x, out) for x, out in batches]) for name, measure in measures.items()}
    found["sharpness"] = {
        "clips": _mean([sharpness_rows(x) for x, _ in batches]),
        "reconstructions": _mean([sharpness_rows(out) for _, out in batches]),
    }
    if t.perceptual != "none":
        distance = load_perceptual(t.perceptual, t.perceptual_files)
        found[t.perceptual] = _mean([distance(x, out) for x, out in batches])
    if features:
        network = load_perceptual("features", [features])
        assert isinstance(network, SceneFeatures)
        both = (features_of(network, part) for part in zip(*batches, strict=True))
        found["frechet"] = frechet_distance(*both)
    return found


def _mean(rows: Sequence[Tensor]) -> float:
    return round(float(torch.cat(list(rows)).double().mean()), 5)


def picture(clips: Tensor, reconstructions: Tensor) -> bytes:
    """A PNG: first, middle and last frame of each clip, original left and reconstruction right."""
    frames = sorted({0, clips.shape[2] // 2, clips.shape[2] - 1})
    lines = [
        torch.cat([v[i, :, t] for v in (clips, reconstructions) for t in frames], dim=2) for i in range(len(clips))
    ]
    pixels = ((torch.cat(lines, dim=1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    scale = max(1, 128 // clips.shape[-2])
    image = Image.fromarray(pixels.repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
