"""An autoencoder and its discriminator on several ranks are those of one process: losses, both gradients, weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from run_case import assert_equal, differences, start, tensors
from safetensors.torch import load_file

from benchmarks.rank_pool import Pool
from vidit.config import RunConfig
from vidit.train import task
from vidit.train.metrics import read_metrics

Configure = Callable[..., RunConfig]
STEPS = 5
RECIPE: dict[str, Any] = {
    "adversarial_weight": 0.5, "adversarial_start": 1, "discriminator_channels": 8, "discriminator_layers": 2,
    "r1_weight": 0.1, "lecam_weight": 0.05, "lecam_decay": 0.9, "wavelet_weight": 0.1,
}  # fmt: skip
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {"zero": 0}),
    "zero1 x2": (2, {"zero": 1}),
    "zero2 x2": (2, {"zero": 2}),
    "zero3 x2": (2, {"zero": 3}),
    "hsdp 2x2": (4, {"replicate": 2}),
}


def start_unaveraged(config: RunConfig) -> bool:
    """With a bug: nobody averages the discriminator's gradient."""
    right = task.build_discriminator
    with patch.object(task, "build_discriminator", lambda c, device, dtype, mesh: right(c, device, dtype)):
        return start(config)


def configured(
    configure: Configure, folder: Path, parallel: dict[str, Any], recipe: dict[str, Any] | None = None, **train: Any
) -> RunConfig:
    recipe = RECIPE | (recipe or {})
    given = {"task": "vae", "steps": STEPS, "precision": "fp64", "global_batch": 4, "micro_batch": 1, **train}
    return configure(folder, train={"validate_every": STEPS, **given}, vae_train=recipe, parallel=parallel)


@pytest.fixture(scope="module")
def one(pool: Pool, configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = configured(configure, tmp_path_factory.mktemp("one"), {})
    assert all(pool.run(1, start, config))
    return config


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_training(pool: Pool, configure: Configure, tmp_path: Path, one: RunConfig, layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    config = configured(configure, tmp_path, parallel)
    assert all(pool.run(world, start, config))
    assert_equal(differences(config, one))
    assert {"discriminator", "lecam", "r1", "adversarial_weight"} <= read_metrics(tmp_path)[2].keys()


@pytest.mark.parametrize("layout", ["dp2", "zero2 x2", "zero3 x2"])
def test_a_frozen_encoder(pool: Pool, configure: Configure, tmp_path: Path, tiny_vae: Path, layout: str) -> None:
    """The weights that a run starts from reach every shard, and what is frozen has no gradient to average."""
    found = []
    for world, parallel in ((1, {}), LAYOUTS[layout]):
        recipe = {"init": str(tiny_vae), "freeze_encoder": True}
        config = configured(configure, tmp_path / str(world), parallel, recipe)
        assert all(pool.run(world, start, config))
        found.append(config)
    assert_equal(differences(found[1], found[0]))
    before, after = load_file(tiny_vae / "model.safetensors"), load_file(tmp_path / "2" / "vae" / "model.safetensors")
    assert all(torch.equal(before[n], after[n]) == (not n.startswith("decoder")) for n in before)


def test_another_layout_goes_on(pool: Pool, configure: Configure, tmp_path: Path, one: RunConfig) -> None:
    assert all(pool.run(2, start, configured(configure, tmp_path, {"zero": 3}, steps=2, validate_every=STEPS)))
    (last,) = (row for row in read_metrics(tmp_path) if "validation" in row)
    assert last["step"] == 2
    config = configured(configure, tmp_path, {})
    assert all(pool.run(1, start, config))
    ours, theirs = tensors(config), tensors(one)
    assert max(float((ours[n] - t).norm() / t.norm().clamp(min=1e-9)) for n, t in theirs.items()) <= 1e-6


def test_a_gradient_that_is_not_averaged_is_seen(
    pool: Pool, configure: Configure, tmp_path: Path, one: RunConfig
) -> None:
    config = configured(configure, tmp_path, {"zero": 0})
    assert all(pool.run(2, start_unaveraged, config))
    with pytest.raises(AssertionError):
        assert_equal(differences(config, one))
