"""`train.compile` changes the speed of a run and nothing else; it goes together with activation checkpointing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vidit.config import RunConfig
from vidit.train.metrics import read_metrics
from vidit.train.run import run


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_losses_are_those_of_the_eager_run(configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    losses = []
    for compiled in (False, True):
        config = configure(
            tmp_path / str(compiled),
            model={"num_layers": 1, "windows": ((1, 0, 0),)},
            data={"num_validation": 0},
            train={"steps": 3, "compile": compiled, "activation_checkpointing": "full" if compiled else "none"},
            sample={"prompts": ()},
        )
        assert run(config)
        losses.append([row["loss"] for row in read_metrics(config.directory)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
