"""`train.trainable` and `train.frozen`: what is not trained stays bit for bit, in the DiT as elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vidit.config import ConfigError, RunConfig
from vidit.export.weights import export_weights
from vidit.model.init import initial_value
from vidit.sample.run import open_trained
from vidit.train.run import run

Configure = Callable[..., RunConfig]


@pytest.fixture
def frozen(configure: Configure, tmp_path: Path) -> Callable[..., RunConfig]:
    def build(name: str = "run", **train: Any) -> RunConfig:
        return configure(tmp_path / name, train={"steps": 2, "learning_rate": 1e-2, **train}, sample={"prompts": ()})

    return build


def weights(config: RunConfig, out: Path) -> dict[str, Tensor]:
    export_weights(config.directory, out, "model")
    return load_file(out / "model.safetensors")


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("train", "is_frozen"),
    [
        ({"frozen": ("dit.blocks.0.*", "text.*")}, lambda name: name.startswith(("dit.blocks.0.", "text."))),
        (
            {"trainable": ("*.modulation.*", "dit.head.*")},
            lambda name: "modulation." not in name and "head." not in name,
        ),
        (
            {"frozen": ("dit.*.mlp.*",), "optimizer": "muon", "activation_checkpointing": "full"},
            lambda name: ".mlp." in name and name.startswith("dit."),
        ),
    ],
)
def test_frozen_weights_have_the_hashes_they_began_with(
    frozen: Any, tmp_path: Path, train: dict[str, Any], is_frozen: Callable[[str], bool]
) -> None:
    config = frozen(**train)
    assert run(config)
    end = weights(config, tmp_path / "out")
    same = {n for n, t in end.items() if digest(t) == digest(initial_value(n, tuple(t.shape), config.train.seed))}
    assert {name for name in end if is_frozen(name)} <= same
    moved = {name for name in end if not is_frozen(name)} - same
    assert len(moved) > 5
    # Sampling has them too, trained ones averaged.
    model = open_trained(config.directory).model
    for name, p in model.named_parameters():
        assert not p.requires_grad, "a pass through the model keeps nothing for gradients of weights"
        assert torch.equal(p, end[name]) or not is_frozen(name)


def test_frozen_weights_have_no_moments_and_no_average(frozen: Any) -> None:
    from parallel import checkpoint

    config = frozen(trainable=("dit.head.*",))
    assert run(config)
    manifest, _ = checkpoint.open_stored(checkpoint.folder_of(config.directory / "checkpoints", 2))
    kept = [name for name in manifest["tensors"] if not name.startswith("model.")]
    assert {name.partition(".")[0] for name in kept} == {"ema", "exp_avg", "exp_avg_sq"}
    assert all(name.partition(".")[2].startswith("dit.head.") for name in kept)


def test_weights_frozen_after_init_from_are_those_of_the_folder(frozen: Any, tmp_path: Path) -> None:
    first = frozen("first")
    assert run(first)
    start = weights(first, tmp_path / "first-weights")
    second = frozen("second", init_from=str(tmp_path / "first-weights"), frozen=("dit.blocks.*",))
    assert run(second)
    end = weights(second, tmp_path / "second-weights")
    assert {n for n in start if digest(start[n]) == digest(end[n])} >= {n for n in start if ".blocks." in n}
    assert any(digest(start[n]) != digest(end[n]) for n in start)
    model = dict(open_trained(second.directory).model.named_parameters())
    assert all(torch.equal(model[n].detach(), start[n]) for n in start if ".blocks." in n)


def test_patterns_are_taken_at_their_word(frozen: Any) -> None:
    with pytest.raises(ValueError, match=r"train\.frozen: dit\.block\.\*, vae\.\* fits none of \d+ parameters; they"):
        run(frozen(frozen=("dit.block.*", "text.*", "vae.*")))
    with pytest.raises(ValueError, match=r"train\.trainable: \*\.temporal_\* fits none"):
        run(frozen(trainable=("*.temporal_*",)))
    with pytest.raises(ValueError, match=r"leaves none of \d+ parameters to train"):
        run(frozen(frozen=("*",)))
    with pytest.raises(ConfigError, match=r"train\.trainable and train\.frozen say the same in two ways"):
        run(frozen(frozen=("text.*",), trainable=("dit.*",)))


def test_what_is_trained_does_not_change_within_a_run(frozen: Any) -> None:
    assert run(frozen(frozen=("text.*",)))
    with pytest.raises(ConfigError, match=r"train\.frozen: the run has"):
        run(frozen(steps=3))
