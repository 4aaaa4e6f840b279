"""What a run's parameters begin as: values keyed by name (`vidit/model/init.py`), or those of `train.init_from`.

A folder of weights is one that `vidit export` or `vidit import` wrote. Of the parts of a run (dit, text, vae) it may
hold some, each of them whole; the others begin as without it. A run that has a checkpoint reads no folder.

A U-Net may begin with an image model, one without layers over time: those begin at zero, so it gives what that gave.
"""

from collections.abc import Callable, Container, Iterable
from pathlib import Path

from torch import Tensor

from vidit.config import RunConfig
from vidit.model.init import initial_value
from vidit.model.unet.unet import TEMPORAL
from vidit.train.rundir import newest_checkpoint
from vidit.train.weights_folder import open_weights, require_keys

OVER_TIME = f".{TEMPORAL}"

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
    wanted -= _added(wanted, weights.shapes)
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


def initial_notes(config: RunConfig, names: Iterable[str]) -> list[str]:
    """What to tell the user of a run that begins: which layers over time an image model lacked."""
    c = config.train
    if c.init_from is None:
        return []
    shapes = open_weights(Path(c.init_from)).shapes
    parts = {_part(name) for name in shapes}
    added = _added({name for name in names if _part(name) in parts}, shapes)
    layers = dict.fromkeys(name.partition(OVER_TIME)[0] + OVER_TIME + _next(name) for name in sorted(added))
    if not layers:
        return []
    return [f"{c.init_from} is an image model; {len(layers)} layers over time begin at zero: {' '.join(layers)}"]


def _added(wanted: set[str], given: Container[str]) -> set[str]:
    """Names of layers over time, where the folder has none of them."""
    over_time = {name for name in wanted if OVER_TIME in name}
    return set() if any(name in given for name in over_time) else over_time


def _next(name: str) -> str:
    return name.partition(OVER_TIME)[2].partition(".")[0]


def _part(name: str) -> str:
    return name.partition(".")[0]
