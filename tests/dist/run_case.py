"""A whole `run()` as a task of the pool, and what two of them have to have in common."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

import torch

from parallel import checkpoint
from vidit.config import RunConfig
from vidit.train.metrics import read_metrics
from vidit.train.run import run


def start(config: RunConfig) -> bool:
    with redirect_stdout(io.StringIO()):
        return run(config)


def tensors(config: RunConfig) -> dict[str, torch.Tensor]:
    manifest, stored = checkpoint.open_stored(
        checkpoint.folder_of(config.directory / "checkpoints", config.train.steps)
    )
    return {name: stored.whole(name) for name in manifest["tensors"]}


def differences(ours: RunConfig, theirs: RunConfig) -> dict[str, float]:
    """Largest relative ones: of what metrics.jsonl tells of each step, and of what the last checkpoint holds."""
    found = {"metrics": 0.0, "tensors": 0.0}
    rows, expected = (read_metrics(c.directory) for c in (ours, theirs))
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, right in zip(rows, expected, strict=True):
        for name, value in (row | row.get("validation", {})).items():
            if isinstance(value, float):
                true = (right | right.get("validation", {}))[name]
                found["metrics"] = max(found["metrics"], abs(value - true) / max(abs(true), 1e-9))
    here, there = tensors(ours), tensors(theirs)
    assert here.keys() == there.keys()
    for name, tensor in there.items():
        error = float((here[name] - tensor).norm() / tensor.norm().clamp(min=1e-9))
        found["tensors"] = max(found["tensors"], error)
    return found


def assert_equal(found: dict[str, float]) -> None:
    assert found["metrics"] <= 1e-8, found
    assert found["tensors"] <= 1e-6, found  # Adam divides by roots of squares that may be tiny
