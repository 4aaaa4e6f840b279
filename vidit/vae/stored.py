"""The geometry of a VAE on disk. No torch, so that a config can be resolved on a login node."""

from pathlib import Path

from pydantic import ValidationError

from vidit.config import ConfigError, RunConfig, Vae


def vae_config(folder: Path) -> Vae:
    """The geometry of a stored VAE, with `weights` set to the folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"vae.weights={folder} holds no config.json; give a folder that a VAE run wrote (RUN/vae)")
    try:
        return Vae.model_validate_json(path.read_text()).model_copy(update={"weights": str(folder)})
    except ValidationError as error:
        raise ValueError(f"{path} is not a VAE config: {error}") from error


def adopt_vae(config: RunConfig) -> RunConfig:
    """Take the VAE's geometry from its folder; a config that says otherwise is a fault.

    A VAE run, and a run without weights, are returned as they are.
    """
    if config.train.task != "dit" or not config.vae.weights:
        return config
    stored = vae_config(Path(config.vae.weights))
    given = config.vae.model_dump(exclude_defaults=True)
    faults = [
        f"vae.{name}={value!r}, but {config.vae.weights} was trained with {getattr(stored, name)!r}; leave it out"
        for name, value in given.items()
        if name != "weights" and value != getattr(stored, name)
    ]
    if faults:
        raise ConfigError(faults)
    return config.model_copy(update={"vae": stored})
