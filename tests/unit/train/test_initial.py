"""`train.init_from`: a run begins with another's weights, whole parts of it or none, and says what does not fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vidit.config import RunConfig
from vidit.export.weights import export_weights
from vidit.model.init import initial_value
from vidit.text.encoder import build_text_encoder
from vidit.train.parallelize import build_dit
from vidit.train.run import run
from vidit.vae.stored import adopt_vae


@pytest.fixture(scope="module")
def weights(configure: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of two steps has become."""
    folder = tmp_path_factory.mktemp("weights")
    assert run(configure(folder / "run", train={"steps": 2, "learning_rate": 1e-2}, sample={"prompts": ()}))
    export_weights(folder / "run", folder / "out", "model")
    return folder / "out"


def built(config: RunConfig) -> dict[str, torch.Tensor]:
    config = adopt_vae(config, 1)
    text = build_text_encoder(config.text, torch.float32)
    return dict(build_dit(config, text, torch.device("cpu"), torch.float32).state_dict())


@pytest.fixture
def start(configure: Callable[..., RunConfig], tmp_path: Path) -> Callable[[Path], RunConfig]:
    def start(folder: Path) -> RunConfig:
        return configure(tmp_path / "new", train={"steps": 1, "init_from": str(folder)}, sample={"prompts": ()})

    return start


def test_every_tensor_is_the_folders(start: Any, weights: Path) -> None:
    found, wanted = built(start(weights)), load_file(weights / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert {name.partition(".")[0] for name in found} == {"dit", "text"}
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


def test_a_part_that_the_folder_lacks_begins_afresh(start: Any, weights: Path, tmp_path: Path) -> None:
    wanted = {n: t for n, t in load_file(weights / "model.safetensors").items() if n.startswith("dit.")}
    (tmp_path / "dit").mkdir()
    save_file(wanted, tmp_path / "dit" / "model.safetensors")
    config = start(tmp_path / "dit")
    found = built(config)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    new = [name for name in found if name.startswith("text.")]
    assert new
    assert all(torch.equal(found[n], initial_value(n, tuple(found[n].shape), config.train.seed)) for n in new)


def test_what_does_not_fit_is_named(start: Any, weights: Path, tmp_path: Path) -> None:
    tensors = load_file(weights / "model.safetensors")
    path = tmp_path / "odd" / "model.safetensors"
    path.parent.mkdir()
    tensors["dit.head.colour"] = tensors.pop("dit.head.project.bias")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"1 missing: dit\.head\.project\.bias; 1 unknown: dit\.head\.colour"):
        built(start(path.parent))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cannot be read as weights.*copy it again"):
        built(start(path.parent))
    path.unlink()
    with pytest.raises(ValueError, match=r"holds no \.safetensors file"):
        built(start(path.parent))


def test_a_run_with_a_checkpoint_reads_no_folder(
    configure: Callable[..., RunConfig], weights: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(weights, tmp_path / "weights"))
    given = {"init_from": str(folder), "checkpoint_every": 1}
    assert run(configure(tmp_path / "run", train={"steps": 1, **given}, sample={"prompts": ()}))
    shutil.rmtree(folder)
    assert run(configure(tmp_path / "run", train={"steps": 2, **given}, sample={"prompts": ()}))
    with pytest.raises(ValueError, match=r"holds no \.safetensors file"):
        run(configure(tmp_path / "other", train={"steps": 2, **given}, sample={"prompts": ()}))
