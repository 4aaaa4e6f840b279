"""A U-Net on several ranks is that of one process: losses, gradients, weights; what is frozen stays, in a DiT too."""

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
from vidit.config import UNET_FAMILIES, RunConfig
from vidit.export.weights import export_weights
from vidit.model.init import initial_value
from vidit.train import task

Configure = Callable[..., RunConfig]
STEPS = 2
SMALL: dict[str, Any] = {
    "channels": 8, "multipliers": (1, 2), "num_res_blocks": 1, "attention": (True, False), "head_dim": 4,
    "norm_groups": 4,
}  # fmt: skip
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {"zero": 0}),
    "zero3 x2": (2, {"zero": 3}),
    "hsdp 2x2": (4, {"replicate": 2}),
}
FROZEN_DIT: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {"zero": 0}),
    "zero3 x2": (2, {"zero": 3}),
    "tensor 2": (2, {"tensor": 2}),
    "pipeline 2": (2, {"pipeline": 2}),
    "sequence 2": (2, {"sequence": 2}),
}


def start_unaveraged(config: RunConfig) -> bool:
    """With a bug: nobody averages a gradient."""
    right = task.build_dit
    with patch.object(task, "build_dit", lambda c, text, device, dtype, mesh: right(c, text, device, dtype)):
        return start(config)


def configured(configure: Configure, folder: Path, family: str, parallel: dict[str, Any], **train: Any) -> RunConfig:
    """Rows of images beside clips in every micro-batch."""
    fields = {"task": "unet", "steps": STEPS, "precision": "fp64", "global_batch": 4, "micro_batch": 2}
    if parallel.get("replicate"):
        fields["global_batch"] = 8
    config = configure(
        folder, train={"validate_every": STEPS, "checkpoint_every": STEPS, **fields, **train}, model={},
        unet={**SMALL, **UNET_FAMILIES.get(family, {"temporal": "none"})}, data={"image_rows": 1}, parallel=parallel,
        sample={"prompts": ()},
    )  # fmt: skip
    tree = config.model_dump(exclude_unset=True)
    del tree["model"]
    return RunConfig.model_validate(tree)


@pytest.fixture(scope="module")
def references(
    pool: Pool, configure: Configure, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], RunConfig]:
    """(family, rows of a step) -> the run in one process."""
    known: dict[tuple[str, int], RunConfig] = {}

    def reference(family: str, rows: int) -> RunConfig:
        if (family, rows) not in known:
            folder = tmp_path_factory.mktemp(f"{family}-{rows}")
            known[family, rows] = configured(configure, folder, family, {}, global_batch=rows)
            assert all(pool.run(1, start, known[family, rows]))
        return known[family, rows]

    return reference


@pytest.mark.parametrize(
    ("family", "layout", "recompute"),
    [
        ("video-ldm", "dp2", "none"),
        ("video-ldm", "hsdp 2x2", "full"),
        ("vdm", "zero3 x2", "none"),
    ],
)
def test_the_same_training(
    pool: Pool, configure: Configure, tmp_path: Path, references: Any, family: str, layout: str, recompute: str
) -> None:
    """In shards too, and in shards that are recomputed."""
    world, parallel = LAYOUTS[layout]
    config = configured(configure, tmp_path, family, parallel, activation_checkpointing=recompute)
    assert all(pool.run(world, start, config))
    assert_equal(differences(config, references(family, config.train.global_batch)))


def test_a_gradient_that_is_not_averaged_is_seen(
    pool: Pool, configure: Configure, tmp_path: Path, references: Any
) -> None:
    config = configured(configure, tmp_path, "video-ldm", {"zero": 0})
    assert all(pool.run(2, start_unaveraged, config))
    with pytest.raises(AssertionError):
        assert_equal(differences(config, references("video-ldm", 4)))


def test_video_upon_frozen_image_layers(pool: Pool, configure: Configure, tmp_path: Path) -> None:
    """The image model's weights reach every shard and stay; layers over time are trained as by one process."""
    image = configured(configure, tmp_path / "image", "none", {}, steps=1, learning_rate=1e-2)
    assert all(pool.run(1, start, image))
    export_weights(tmp_path / "image", tmp_path / "weights", "model")
    found = []
    for world, parallel in ((1, {}), LAYOUTS["zero3 x2"]):
        given = {"init_from": str(tmp_path / "weights"), "trainable": ("unet.*.temporal_*",)}
        config = configured(configure, tmp_path / str(world), "video-ldm", parallel, **given)
        assert all(pool.run(world, start, config))
        found.append(config)
    assert_equal(differences(found[1], found[0]))
    before, after = load_file(tmp_path / "weights" / "model.safetensors"), tensors(found[1])
    assert all(torch.equal(after[f"model.{name}"].float(), tensor) for name, tensor in before.items())
    moments = [name for name in after if not name.startswith("model.")]
    assert moments
    assert all(".temporal_" in name for name in moments)


@pytest.fixture(scope="module")
def freezing(configure: Configure) -> Callable[[Path, dict[str, Any]], RunConfig]:
    """A run with frozen layers in a folder, on a layout."""
    train = {"steps": STEPS, "precision": "fp64", "global_batch": 4, "micro_batch": 1, "learning_rate": 1e-2}
    train |= {"validate_every": STEPS, "checkpoint_every": STEPS, "frozen": ("dit.blocks.1.*", "text.*")}
    return lambda folder, parallel: configure(folder, train=train, parallel=parallel, sample={"prompts": ()})


@pytest.fixture(scope="module")
def frozen_alone(pool: Pool, freezing: Any, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config: RunConfig = freezing(tmp_path_factory.mktemp("alone"), {})
    assert all(pool.run(1, start, config))
    return config


@pytest.mark.parametrize("layout", FROZEN_DIT)
def test_frozen_layers_of_a_dit(
    pool: Pool, freezing: Any, frozen_alone: RunConfig, tmp_path: Path, layout: str
) -> None:
    world, parallel = FROZEN_DIT[layout]
    config = freezing(tmp_path, parallel)
    assert all(pool.run(world, start, config))
    assert_equal(differences(config, frozen_alone))
    after = tensors(config)
    for name, tensor in after.items():
        own = name.partition(".")[2]
        if own.startswith(("dit.blocks.1.", "text.")):
            assert name.startswith("model."), "what is frozen has no moments and no average"
            assert torch.equal(tensor.float(), initial_value(own, tuple(tensor.shape), 0))
