"""Kernels that sum in one order, for as long as a run lasts and no longer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from vidit.config import RunConfig
from vidit.train import run as training
from vidit.train.precision import WORKSPACE, deterministic


def modes() -> tuple[int, bool, str | None]:
    filled: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    return torch.get_deterministic_debug_mode(), filled, os.environ.get(WORKSPACE)


@pytest.mark.parametrize("on", [False, True])
def test_a_run_asks_for_them(on: bool, configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    before, seen = modes(), []

    def note(config: RunConfig) -> None:
        seen.append(modes())
        raise InterruptedError

    with patch.object(training, "read_splits", note), pytest.raises(InterruptedError):
        training.run(configure(tmp_path / "run", train={"deterministic": on}))
    assert seen == [(2, False, ":4096:8") if on else before]
    assert modes() == before


def test_what_a_caller_has_set_is_kept() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = modes()
        for on in (False, True):
            with deterministic(on):
                assert torch.is_deterministic_algorithms_warn_only_enabled() != on
            assert modes() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_operator_without_one_is_refused() -> None:
    x = torch.zeros(3)
    with deterministic(True), pytest.raises(RuntimeError, match="deterministic"):
        x.put_(torch.tensor([0, 0]), torch.ones(2))
