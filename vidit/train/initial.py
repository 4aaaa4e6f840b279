"""What a run's parameters begin as: values keyed by name (`vidit/model/init.py`), or those of `train.init_from`.

A folder of weights is one that `vidit export` or `vidit import` wrote. Of the parts of a run (dit, text, vae) it may
hold some, each of them whole; the others begin as without it. A run that has a checkpoint reads no folder.

Parts of a denoiser that begin by adding zero may be new to the weights (`NEW`): a model of images becomes one of videos
(GenTron, U-Nets) that starts as the same model of each frame, one of text takes given frames (Open-Sora-Plan), one of
classes reads text (PixArt-alpha, 2310.00426). What closes attention to text, or adds a caption to the time, is
zero only there (`CLOSING`): in a model that begins anew nothing would have taught the rest to do without.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from vidit.config import RunConfig
from vidit.model.init import initial_value
from vidit.train.rundir import newest_checkpoint
from vidit.train.weights_folder import open_weights, require_keys

# By what is in their names: what they are, all of them or none in a folder.
NEW = {
    ".temporal": "attention through time",
    ".frame_rate.": "frame rate",
    ".patch.given.": "channels of given frames",
    ".cross": "attention to text",
    ".embed.text.": "text embedding",
    ".embed.second_text.": "embedding of a second text",
    ".conditioning.pooled.": "pooled caption",
}
# What attention to text reads, new only with it. In a U-Net neither would begin by adding zero.
BEFORE = {".embed.text.", ".embed.second_text."}
OF_DIT = {".cross", ".conditioning.pooled.", *BEFORE}
CLOSING = re.compile(r"^dit\..*\.(cross\.out|conditioning\.pooled(\.out)?)\.(weight|bias)$")

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
    lacking = _lacking(weights.shapes)
    wanted = {name for name in wanted if not any(part in name for part in lacking)}
    require_keys(wanted, set(weights.shapes), f"train.init_from={c.init_from}")

    def value(name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in weights.shapes:
            closes = _part(name) in parts and CLOSING.search(name)
            return torch.zeros(shape) if closes else initial_value(name, shape, c.seed)
        if weights.shapes[name] != shape:
            raise ValueError(
                f"{name} is {weights.shapes[name]} in train.init_from={c.init_from}, but {shape} by this config; use "
                "the model section, the VAE's channels and the text width that belong to it"
            )
        return weights.get(name)

    return value


def new_parts(config: RunConfig, names: Iterable[str]) -> list[str]:
    """What to say of the parts of the denoiser that the folder of `train.init_from` lacks and that begin anew.

    `names` are of every parameter of the model.
    """
    folder = config.train.init_from
    if folder is None or newest_checkpoint(Path(config.directory)) is not None:
        return []
    shapes = open_weights(Path(folder)).shapes
    if not any(_part(name) == config.train.task for name in shapes):
        return []
    said = []
    for part in _lacking(shapes):
        if new := [name for name in names if part in name]:
            layers = " ".join(dict.fromkeys(_layer(name, part) for name in new))
            begins = "which only new parts read" if part in BEFORE else "which begins by adding zero"
            said.append(f"train.init_from={folder} has no {NEW[part]}: new is {layers}, {begins}")
    return said


def _layer(name: str, part: str) -> str:
    """The module of a U-Net that a parameter belongs to; of a DiT, whose blocks are alike, all of that kind."""
    before, _, after = name.partition(part)
    if _part(name) == "dit":
        return f"{before}{part}*" if before == "dit" else f"dit.*{part}*"
    return before + part.rstrip(".") + ("" if part.endswith(".") else after.partition(".")[0])


def _lacking(names: Iterable[str]) -> list[str]:
    """What of `NEW` is in none of the names."""
    names = list(names)
    excluded = set() if any(_part(name) == "dit" for name in names) else OF_DIT
    if any(".cross" in name for name in names):
        excluded = excluded | BEFORE
    return [part for part in NEW if part not in excluded and not any(part in name for name in names)]


def _part(name: str) -> str:
    return name.partition(".")[0]
