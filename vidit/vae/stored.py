"""The geometry of a VAE on disk. No torch, so that a config can be resolved on a login node."""

import filecmp
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vidit.config import ConfigError, RunConfig, Vae
from vidit.resolve import faults
from vidit.vae.catalog import WEIGHTS, borrowed_config
from vidit.vae.place import vae_folder

# What the run says of its VAE: in what parts it codes, which is no matter of the weights.
HOW = ("max_frames", "tile", "tile_overlap")
WHERE = ("weights", "revision")
ORIGIN = "origin.json"


def vae_config(folder: Path, option: str = "vae.weights") -> Vae:
    """The geometry of a stored VAE, with `weights` set to the folder. ValueError where there is none to read.

    option: of the config, that the folder was given as, for messages.
    """
    path = folder / "config.json"
    if not path.is_file():
        hub = ", or a hub name with vae.revision" if option == "vae.weights" else ""
        raise ValueError(
            f"{option}={folder} holds no config.json; give a folder that a VAE run wrote (RUN/vae) or diffusers{hub}"
        )
    facts = _facts(path)
    if "_class_name" in facts:
        return borrowed_config(folder, facts, option)
    try:
        return Vae.model_validate_json(path.read_text()).model_copy(update={"weights": str(folder)})
    except ValidationError as error:
        found = "; ".join(" ".join([".".join(map(str, fault["loc"])), fault["msg"]]) for fault in error.errors())
        raise ValueError(f"{path} is not a VAE config: {found}") from error


def vae_files(folder: Path) -> tuple[str, str]:
    """Names of the config and the weights of a stored VAE."""
    return "config.json", WEIGHTS if "_class_name" in _facts(folder / "config.json") else "model.safetensors"


def is_same_vae(one: Path, other: Path) -> bool:
    """Whether two folders hold the same VAE: the weights, and with a class of diffusers all that it was built from."""
    names = vae_files(one)
    if names != vae_files(other) or not filecmp.cmp(one / names[1], other / names[1], shallow=False):
        return False
    return names[1] != WEIGHTS or _built_from(one) == _built_from(other)


def _built_from(folder: Path) -> dict[str, Any]:
    ignored = ("_diffusers_version", "_name_or_path")
    return {name: value for name, value in _facts(folder / "config.json").items() if name not in ignored}


def _facts(path: Path) -> dict[str, Any]:
    """A `config.json`; empty where it is no JSON object, or not there."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def find_vae(config: RunConfig) -> RunConfig:
    """The config with the run's own copy for `vae.weights`, where a resumed run's original is gone."""
    given, copy = config.vae.weights, config.directory / "vae"
    resumed = any((config.directory / "checkpoints").glob("step-*/manifest.json"))
    if given and not Path(given).exists() and resumed and (copy / "config.json").is_file():
        # Of a hub name the copy is known to be the one; nobody wants to ask the network for it at every start.
        if config.vae.revision and _facts(copy / ORIGIN) != origin_of(config.vae):
            return config
        return with_vae(config, copy)
    return config


def origin_of(vae: Vae) -> dict[str, Any]:
    """What tells where a run's copy comes from, as it is kept beside it."""
    return {"weights": vae.weights, "revision": vae.revision}


def with_vae(config: RunConfig, folder: Path) -> RunConfig:
    """The config with a VAE of a local folder."""
    return config.model_copy(update={"vae": config.vae.model_copy(update={"weights": str(folder), "revision": None})})


def adopt_vae(config: RunConfig, world_size: int | None = None) -> RunConfig:
    """Take the VAE's geometry from its folder; a config that says otherwise, or a folder without one, is a fault.

    A VAE run, and a run without weights, are returned as they are. Raises ConfigError with the faults of the
    folder and, so that all are seen at once, those that `resolve` would find.
    """
    if config.train.task == "vae" or not config.vae.weights:
        return config
    try:
        stored = vae_config(vae_folder(config.vae))
    except ValueError as error:
        raise ConfigError([str(error), *faults(config, world_size, geometry_known=False)]) from error
    contradictions = list(_contradictions(config.vae, stored))
    stored = stored.model_copy(update={name: getattr(config.vae, name) for name in (*WHERE, *HOW)})
    adopted = config.model_copy(update={"vae": stored})
    if contradictions:
        raise ConfigError([*contradictions, *faults(adopted, world_size)])
    return adopted


def _contradictions(given: Vae, stored: Vae) -> Iterator[str]:
    for name, value in _given(given).items():
        if stored.is_borrowed and name not in stored.model_fields_set:
            yield f"vae.{name}={value!r} has no effect on {given.weights}, a {stored.kind} of diffusers; leave it out"
        elif value != getattr(stored, name):
            yield f"vae.{name}={value!r}, but {given.weights} was trained with {getattr(stored, name)!r}; leave it out"


def _given(vae: Vae) -> dict[str, object]:
    """The fields that were written down, even with the value of their default.

    A section read back from a whole JSON names every field: there only what differs from the default speaks.
    """
    whole = vae.model_fields_set == set(Vae.model_fields)
    given = vae.model_dump(exclude_defaults=whole, exclude_unset=not whole)
    return {name: value for name, value in given.items() if name not in (*WHERE, *HOW)}
