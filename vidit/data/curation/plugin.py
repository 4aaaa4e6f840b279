"""Scores by code of the user's own, such as an aesthetic model loaded from a local folder.

A plug-in is a function ``(frames, caption) -> {name: number}`` in a module with a ``__version__``: frames are uint8
(T, H, W, 3), RGB, up to 9 stills spread evenly over the clip, their short side at most 480 pixels. It runs in the
worker processes, so it loads its model when it is first called. The version is stored with the scores: raising it
makes the next ``vidit score`` compute them anew.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

NAME = re.compile(r"[a-z][a-z0-9_]*")
RawPlugin = Callable[[NDArray[np.uint8], str], Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plug-in that is loaded; ``name`` is as the user gave it."""

    name: str
    version: str
    function: RawPlugin

    @property
    def scorer(self) -> str:
        """What its scores are stored under."""
        return f"{self.name}@{self.version}"

    def __call__(self, frames_THWC: NDArray[np.uint8], caption: str, key: str) -> dict[str, float]:
        """Its scores of the clip ``key``, checked. RuntimeError where it fails or gives something else."""
        try:
            scores = self.function(frames_THWC, caption)
        except Exception as error:
            raise RuntimeError(f"plug-in {self.name}, clip {key}: {type(error).__name__}: {error}") from error
        if not isinstance(scores, Mapping) or not scores:
            raise RuntimeError(f"plug-in {self.name}, clip {key}: it gave {scores!r:.80}; return {{name: number}}")
        for name, value in scores.items():
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise RuntimeError(f"plug-in {self.name}: a score is named {name!r}; use a-z, 0-9 and _")
            if not isinstance(value, int | float | np.number) or not math.isfinite(value):
                raise RuntimeError(f"plug-in {self.name}, clip {key}: {name}={value!r} is no finite number")
        return {name: float(value) for name, value in scores.items()}


@functools.cache
def load_plugin(name: str) -> Plugin:
    """The function named ``module:function`` or ``path/to/file.py:function``. ValueError where there is none."""
    module_name, colon, attribute = name.rpartition(":")
    if not colon or not module_name or "@" in name:
        raise ValueError(f"plug-in {name!r} is not named module:function or file.py:function")
    module = _module(module_name)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"plug-in {name}: {module_name} has no function {attribute!r}")
    version = getattr(module, "__version__", None)
    if not isinstance(version, str) or not version:
        raise ValueError(
            f'plug-in {name}: {module_name} has no __version__; add __version__ = "1", and raise it when its scores '
            "change"
        )
    return Plugin(name, version, function)


def _module(name: str) -> ModuleType:
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"no plug-in file {path}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except Exception as error:
        if isinstance(error, ValueError):
            raise
        raise ValueError(f"plug-in module {name} does not load: {type(error).__name__}: {error}") from error
