"""From our denoiser to a class of diffusers and back, tensor by tensor, bit for bit.

`imported` and `exported` give names, shapes and a way to get one tensor, so a model of any size passes one at a time;
`from_diffusers` and `to_diffusers` have it whole in memory. Only `to_diffusers` imports the library.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vidit.config import Model
from vidit.export.diffusers.cogvideox import COGVIDEOX
from vidit.export.diffusers.dit import DIT
from vidit.export.diffusers.family import Family, Geometry
from vidit.export.diffusers.hunyuanvideo import HUNYUANVIDEO
from vidit.export.diffusers.latte import LATTE
from vidit.export.diffusers.wan import WAN
from vidit.model.dit import DiT
from vidit.train.weights_folder import Weights, open_weights, require_keys

FAMILIES = (WAN, COGVIDEOX, LATTE, HUNYUANVIDEO, DIT)


def from_diffusers(source: str | Path | nn.Module) -> DiT:
    """The denoiser that a module of diffusers, or a folder with its config.json and safetensors files, holds; fp32.

    Raises ValueError where the class or its geometry is not known here, and where keys are missing or unknown.
    """
    geometry, tensors = imported(source)
    dit = on_meta(geometry)
    dit.load_state_dict({name: tensors.get(name).float() for name in tensors.shapes}, assign=True)
    return dit


def to_diffusers(model: DiT, latent: tuple[int, int, int] | None = None, text_tokens: int | None = None) -> nn.Module:
    """The module of diffusers with the weights of `model`; `latent` (T, H, W) and `text_tokens` as in `Geometry`.

    Raises ValueError where the model's geometry has no class there.
    """
    import diffusers

    state = {name: p.detach() for name, p in model.state_dict().items()}
    shapes = {name: tuple(p.shape) for name, p in state.items()}
    geometry = Geometry(model.config, model.channels, model.text_width, latent, text_tokens)
    config, tensors = exported(geometry, Weights(shapes, state.__getitem__))
    module: nn.Module = getattr(diffusers, config["_class_name"])(**{k: v for k, v in config.items() if k[0] != "_"})
    module.load_state_dict({name: tensors.get(name) for name in tensors.shapes})
    return module


def imported(source: str | Path | nn.Module) -> tuple[Geometry, Weights]:
    """Geometry and tensors, under our names, of a module or a folder of theirs."""
    config, given = _of_module(source) if isinstance(source, nn.Module) else opened(Path(source))
    family = _family_of_class(config.get("_class_name"))
    geometry = family.geometry(config)
    places = family.places(wanted := _shapes(on_meta(geometry)), geometry.model)
    needed = {name for place in places.values() for name in place.names}
    require_keys(needed, set(given.shapes) - set(family.computed), family.cls)
    family.agree(config, given.shapes)

    def get(name: str) -> Tensor:
        found = places[name].form.ours([given.get(theirs) for theirs in places[name].names], geometry.model)
        if tuple(found.shape) != wanted[name]:
            raise ValueError(
                f"{' and '.join(places[name].names)} become {tuple(found.shape)}, but {name} is {wanted[name]} by the "
                "config.json beside them; take both from one checkpoint"
            )
        return found.contiguous()

    return geometry, Weights(wanted, get)


def exported(geometry: Geometry, given: Weights) -> tuple[dict[str, Any], Weights]:
    """Their config.json and the tensors under their names; `given` are ours."""
    if shape := given.shapes.get("embed.conditioning.pooled.up.weight"):  # with pooled_width=0 only the encoder knows
        geometry = geometry._replace(model=geometry.model.model_copy(update={"pooled_width": shape[1]}))
    family = family_of(geometry.model)
    require_keys(set(_shapes(on_meta(geometry))), set(given.shapes), "the model")
    places = family.places(given.shapes, geometry.model)
    sources: dict[str, list[tuple[str, int]]] = {}
    for name in sorted(places, key=lambda name: places[name].form.part):
        for number, theirs in enumerate(places[name].names):
            sources.setdefault(theirs, []).append((name, number))

    def made(theirs: str, ours: Callable[[str], Tensor]) -> Tensor:
        parts = [places[name].form.theirs(ours(name), geometry.model)[number] for name, number in sources[theirs]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def empty(name: str) -> Tensor:
        return torch.empty(given.shapes[name], device="meta")

    about = {"_class_name": family.cls, **family.fixed, **family.write(geometry)}
    shapes = {theirs: tuple(made(theirs, empty).shape) for theirs in sources}
    return about, Weights(shapes, lambda theirs: made(theirs, given.get).contiguous())


def family_of(c: Model) -> Family:
    """The family whose class expresses a model. ValueError that says what keeps it from the nearest one."""
    by_distance = sorted(FAMILIES, key=lambda family: len(list(family.differences(c))))
    nearest = by_distance[0]
    if faults := list(nearest.differences(c)):
        cures = "".join(f"; {cure}" for name, cure in nearest.cures.items() if getattr(c, name) != nearest.fields[name])
        known = " ".join(family.name for family in FAMILIES)
        raise ValueError(
            f"no class of diffusers expresses this model; of {known} the nearest fails by {'; '.join(faults)}{cures}"
        )
    return nearest


def on_meta(geometry: Geometry) -> DiT:
    with torch.device("meta"):
        return DiT(geometry.model, geometry.channels, (1, 1, 1), geometry.text_width)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _family_of_class(cls: object) -> Family:
    for family in FAMILIES:
        if cls in (family.cls, *family.older):
            return family
    raise ValueError(f"class {cls} is not known here; use one of {' '.join(family.cls for family in FAMILIES)}")


def _of_module(module: nn.Module) -> tuple[Mapping[str, Any], Weights]:
    state = module.state_dict()
    config = {**getattr(module, "config", {}), "_class_name": type(module).__name__}
    return config, Weights(_shapes(module), lambda name: state[name].detach())


def opened(folder: Path) -> tuple[Mapping[str, Any], Weights]:
    """A folder as `save_pretrained` writes it, or a pipeline's, which has it as `transformer` or `unet`.

    ValueError where it cannot be read.
    """
    folder = next((folder / part for part in ("transformer", "unet") if (folder / part).is_dir()), folder)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no model of diffusers: config.json cannot be read: {error}") from error
    return config, open_weights(folder)
