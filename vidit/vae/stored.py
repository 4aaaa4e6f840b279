"""The geometry of a VAE on disk. No torch, so that a config can be resolved on a login node."""

from pathlib import Path

from pydantic import ValidationError

from vidit.config import ConfigError, RunConfig, Vae
from vidit.resolve import faults

# What the run says of its VAE: in what parts it codes, which is no matter of the weights.
HOW = ("max_frames", "tile", "tile_overlap")


def vae_config(folder: Path) -> Vae:
    """The geometry of a stored VAE, with `weights` set to the folder. ValueError where there is none to read."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"vae.weights={folder} holds no config.json; give a folder that a VAE run wrote (RUN/vae)")
    try:
        return Vae.model_validate_json(path.read_text()).model_copy(update={"weights": str(folder)})
    except ValidationError as error:
        found = "; ".join(" ".join([".".join(map(str, fault["loc"])), fault["msg"]]) for fault in error.errors())
        raise ValueError(f"{path} is not a VAE config: {found}") from error


def find_vae(config: RunConfig) -> RunConfig:
    """The config with the run's own copy for `vae.weights`, where a resumed run's original is gone."""
    given, copy = config.vae.weights, config.directory / "vae"
    resumed = any((config.directory / "checkpoints").glob("step-*/manifest.json"))
    if given and not Path(given).exists() and resumed and (copy / "config.json").is_file():
        return config.model_copy(update={"vae": config.vae.model_copy(update={"weights": str(copy)})})
    return config


def adopt_vae(config: RunConfig, world_size: int | None = None) -> RunConfig:
    """Take the VAE's geometry from its folder; a config that says otherwise, or a folder without one, is a fault.

    A VAE run, and a run without weights, are returned as they are. Raises ConfigError with the faults of the
    folder and, so that all are seen at once, those that `resolve` would find.
    """
    if config.train.task != "dit" or not config.vae.weights:
        return config
    try:
        stored = vae_config(Path(config.vae.weights))
    except ValueError as error:
        raise ConfigError([str(error), *faults(config, world_size, geometry_known=False)]) from error
    stored = stored.model_copy(update={name: getattr(config.vae, name) for name in HOW})
    adopted = config.model_copy(update={"vae": stored})
    contradictions = [
        f"vae.{name}={value!r}, but {config.vae.weights} was trained with {getattr(stored, name)!r}; leave it out"
        for name, value in _given(config.vae).items()
        if value != getattr(stored, name)
    ]
    if contradictions:
        raise ConfigError([*contradictions, *faults(adopted, world_size)])
    return adopted


def _given(vae: Vae) -> dict[str, object]:
    """The fields that were written down, even with the value of their default.

    A section read back from a whole JSON names every field: there only what differs from the default speaks.
    """
    whole = vae.model_fields_set == set(Vae.model_fields)
    given = vae.model_dump(exclude_defaults=whole, exclude_unset=not whole)
    return {name: value for name, value in given.items() if name not in ("weights", *HOW)}
