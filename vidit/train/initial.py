"""What a run's parameters begin as: values keyed by name (`vidit/model/init.py`), or those of `train.init_from`.

A folder of weights is one that `vidit export` or `vidit import` wrote. Of the parts of a run (dit, text, vae) it may
hold some, each of them whole; the others begin as without it. A run that has a checkpoint reads no folder.

A model of images may become one of videos (GenTron): a denoiser with attention through time takes weights without, and
what is new then adds zero, so that it starts as the same model of each frame.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from vidit.config import RunConfig
from vidit.model.init import initial_value
from vidit.train.rundir import newest_checkpoint
from vidit.train.weights_folder import open_weights, require_keys

TEMPORAL = ".temporal"
"""In the names of attention through time and of its norm."""

Value = Callable[[str, tuple[int, ...]], Tensor]


def initial_values(config: RunConfig, names: Iterable[str]) -> Value:
    """(name, shape) -> full initial tensor; `names` are of every tensor of the whole model, on whatever ranks.

    Raises ValueError where the folder has other names or, when called, another shape.
    """
    c = config.train
    if c.init_from is None or newest_checkpoint(Path(config.directory)) is not None:
        return lambda name, shape: initial_value(name, shape, c.seed)
    weights = open_weights(Path(c.init_from))
    parts = {_part(name) for name in weights.shapes}
    wanted = {name for name in names if _part(name) in parts}
    if not _has_temporal(weights.shapes):
        wanted = {name for name in wanted if TEMPORAL not in name}
    require_keys(wanted, set(weights.shapes), f"train.init_from={c.init_from}")

    def value(name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in weights.shapes:
            return initial_value(name, shape, c.seed)
        if weights.shapes[name] != shape:
            raise ValueError(
                f"{name} is {weights.shapes[name]} in train.init_from={c.init_from}, but {shape} by this config; use "
                "the model section, the VAE's channels and the text width that belong to it"
            )
        return weights.get(name)

    return value


def new_parts(config: RunConfig) -> list[str]:
    """What to say of the parts of the denoiser that the folder of `train.init_from` lacks and that begin anew."""
    folder = config.train.init_from
    if folder is None or not config.model.temporal_attention or newest_checkpoint(Path(config.directory)) is not None:
        return []
    shapes = open_weights(Path(folder)).shapes
    if _has_temporal(shapes) or not any(_part(name) == "dit" for name in shapes):
        return []
    return [
        f"train.init_from={folder} has no attention through time: new are dit.blocks.*{TEMPORAL}* of "
        f"{config.model.num_layers} blocks, whose output begins at zero"
    ]


def _has_temporal(names: Iterable[str]) -> bool:
    return any(TEMPORAL in name for name in names)


def _part(name: str) -> str:
    return name.partition(".")[0]
