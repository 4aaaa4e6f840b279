"""Models of diffusers on disk: a folder of theirs becomes what a run can start from, a run becomes a folder of theirs.

Neither needs the library: the files are read and written as its `from_pretrained` and `save_pretrained` do.
"""

import json
from pathlib import Path
from typing import Literal

from torch import Tensor

from vidit.config import Section
from vidit.export.diffusers.convert import exported, imported, opened
from vidit.export.diffusers.family import Geometry
from vidit.export.diffusers.unet import CLASS, UnetGeometry, imported_unet
from vidit.export.files import DTYPES, Kind, new_folder, write_tensors
from vidit.export.weights import Weights as Chosen
from vidit.export.weights import chosen_checkpoint, trained_weights
from vidit.resolve import resolve
from vidit.train.rundir import read_config
from vidit.train.weights_folder import Weights
from vidit.whole_file import write_whole

STEM = "diffusion_pytorch_model"
PART = "dit."


def import_diffusers(source: Path, out: Path, dtype: Literal["fp32", "bf16"] = "fp32") -> Geometry | UnetGeometry:
    """Write `model.safetensors`, for `train.init_from`, and the config's section, `model.json`, into a new folder.

    Of a U-Net, which is one for images, the section is `unet.json`.

    Raises ValueError where the class or its geometry is not known here, where keys are missing or unknown, or where
    `out` holds something.
    """
    about, given = opened(source)
    if about.get("_class_name") == CLASS:
        made, weights = imported_unet(about, given)
        _write(out, section_of(made), made.unet, weights, dtype)
        return made
    geometry, weights = imported(source)
    _write(out, section_of(geometry), geometry.model, weights, dtype)
    return geometry


def section_of(geometry: Geometry | UnetGeometry) -> str:
    """The section of a config that a geometry is of."""
    return "unet" if isinstance(geometry, UnetGeometry) else "model"


def _write(out: Path, section: str, c: Section, weights: Weights, dtype: Literal["fp32", "bf16"]) -> None:
    part = "unet." if section == "unet" else PART
    kinds = {part + name: Kind(shape, DTYPES[dtype]) for name, shape in weights.shapes.items()}
    with new_folder(out) as partial:
        write_tensors(partial, kinds, lambda name: weights.get(name.removeprefix(part)))
        write_whole(partial / f"{section}.json", c.model_dump_json(indent=1) + "\n")


def export_diffusers(
    run_dir: Path,
    out: Path,
    weights: Chosen = "ema",
    dtype: Literal["fp32", "bf16"] = "fp32",
    step: int | None = None,
) -> list[Path]:
    """Write a run's denoiser as the class of diffusers that expresses it, into the new folder `out`; returns the files.

    Raises ValueError where no class does, or where the run has no such checkpoint; else as `export_weights`.
    """
    config = read_config(run_dir)
    if config.train.task == "unet":
        raise ValueError(f"{run_dir} holds a U-Net, which no class of diffusers expresses; leave --format out")
    trained = trained_weights(chosen_checkpoint(run_dir, step), weights)
    own = {
        name.removeprefix(PART): kind for name, kind in trained.kinds(DTYPES[dtype]).items() if name.startswith(PART)
    }

    def get(name: str) -> Tensor:
        return trained.get(PART + name)

    shapes = {name: kind.shape for name, kind in own.items()}
    r = resolve(config)
    latent = (r.latent_frames, r.latent_height, r.latent_width)
    geometry = Geometry(config.model, config.vae.latent_channels, _text_width(shapes), latent, config.text.max_tokens)
    about, theirs = exported(geometry, Weights(shapes, get))
    with new_folder(out) as partial:
        write_tensors(partial, {n: Kind(s, DTYPES[dtype]) for n, s in theirs.shapes.items()}, theirs.get, STEM)
        write_whole(partial / "config.json", json.dumps(about, indent=1) + "\n")
    return sorted(out.iterdir())


def _text_width(shapes: dict[str, tuple[int, ...]]) -> int:
    """What the first layer of the text embedding takes; 0 where the model has none."""
    layers = [shapes[name] for name in ("embed.text.up.weight", "embed.text.out.weight") if name in shapes]
    return layers[0][1] if layers else 0
