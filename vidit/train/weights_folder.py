"""Weights that lie in a folder as safetensors files: what there is, and one tensor at a time. Nothing is unpickled."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor


class Weights(NamedTuple):
    """Names and shapes of tensors, and one of them by name."""

    shapes: dict[str, tuple[int, ...]]
    get: Callable[[str], Tensor]


def open_weights(folder: Path) -> Weights:
    """All tensors of the folder's .safetensors files. ValueError where it holds none, or one that is damaged."""
    try:
        files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
        owner = {name: file for file in files for name in file.offset_keys()}
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in owner.items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be read as weights: {error}; copy it again") from error
    if not files:
        raise ValueError(f"{folder} holds no .safetensors file; nothing else is read, since it may hold code")
    return Weights(shapes, lambda name: owner[name].get_tensor(name))


def require_keys(wanted: set[str], given: set[str], whose: str) -> None:
    """ValueError that names what is missing and what nothing here has a place for."""
    pairs = (("missing", sorted(wanted - given)), ("unknown", sorted(given - wanted)))
    told = [f"{len(keys)} {word}: {', '.join(keys[:5])}{' ...' * (len(keys) > 5)}" for word, keys in pairs if keys]
    if told:
        raise ValueError(f"the weights of {whose} do not fit this geometry: {'; '.join(told)}")
