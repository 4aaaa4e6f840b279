"""Kernels that sum in one order, for as long as a run lasts and no longer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from vidit.config import RunConfig
from vidit.train import run as training
from vidit.train.precision import deterministic


@pytest.mark.parametrize("on", [False, True])
def test_a_run_asks_for_them(on: bool, configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    seen = []
    with (
        patch.object(training, "read_splits", lambda config: seen.append(torch.are_deterministic_algorithms_enabled())),
        pytest.raises(TypeError),
    ):
        training.run(configure(tmp_path / "run", train={"deterministic": on}))
    assert seen == [on]
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operator_without_one_is_refused() -> None:
    x = torch.zeros(3)
    with deterministic(True), pytest.raises(RuntimeError, match="deterministic"):
        x.put_(torch.tensor([0, 0]), torch.ones(2))
