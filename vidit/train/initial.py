"""What a run's parameters begin as: values keyed by name (`vidit/model/init.py`), or those of `train.init_from`.

A folder of weights is one that `vidit export` or `vidit import` wrote. Of the parts of a run (dit, text, vae) it may
hold some, each of them whole; the others begin as without it. A run that has a checkpoint reads no folder.

A denoiser may begin with an image model, one without layers over time, or with one that is told no frame rate: what
is new adds zero in the beginning, so it gives what that gave.
"""

from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from torch import Tensor

from vidit.config import RunConfig
from vidit.model.init import initial_value
from vidit.train.rundir import newest_checkpoint
from vidit.train.weights_folder import open_weights, require_keys

# In the names of parameters that a model may begin without.
OVER_TIME, FRAME_RATE = ".temporal", ".frame_rate."

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
    """What to tell the user of a run that begins: which layers the folder of its weights lacked."""
    c = config.train
    if c.init_from is None:
        return []
    shapes = open_weights(Path(c.init_from)).shapes
    parts = {_part(name) for name in shapes}
    added = sorted(_added({name for name in names if _part(name) in parts}, shapes))
    if not added:
        return []
    layers = dict.fromkeys(_layer(name) for name in added)
    return [f"train.init_from={c.init_from} lacks {len(layers)} layers, which begin at zero: {' '.join(layers)}"]


def _added(wanted: set[str], given: Collection[str]) -> set[str]:
    """Names of layers over time where the folder has none of a kind, and the same of the frame rate."""
    found: set[str] = set()
    for kind in (OVER_TIME, FRAME_RATE):
        if not any(kind in name for name in given):
            found |= {name for name in wanted if kind in name}
    return found


def _layer(name: str) -> str:
    """The module over time that a parameter belongs to, or the one that takes the frame rate."""
    before, kind, after = name.partition(OVER_TIME if OVER_TIME in name else FRAME_RATE.rstrip("."))
    return before + kind + after.partition(".")[0]


def _part(name: str) -> str:
    return name.partition(".")[0]
