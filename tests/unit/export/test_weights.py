"""Full weights of a run: the averages or the weights, whole, in one file or several, one tensor in memory at a time."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from parallel import checkpoint
from parallel.checkpoint import CheckpointError
from parallel.stored import Stored
from vidit.cli import main
from vidit.config import RunConfig
from vidit.export.weights import export_weights
from vidit.text.encoder import build_text_encoder
from vidit.train.parallelize import build_dit
from vidit.train.run import run


@pytest.fixture(scope="module")
def run_dir(configure: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps, saved at 2 and 4."""
    folder = tmp_path_factory.mktemp("export") / "run"
    train = {"steps": 4, "checkpoint_every": 2, "validate_every": 4, "ema_decay": 0.5}
    assert run(configure(folder, train=train, sample={"prompts": ()}))
    return folder


def tensors_of(run_dir: Path, step: int) -> dict[str, Tensor]:
    _, stored = checkpoint.open_stored(checkpoint.folder_of(run_dir / "checkpoints", step))
    return {name: stored.whole(name) for name in stored.tensors}


@pytest.mark.parametrize(("weights", "step"), [("ema", None), ("model", None), ("ema", 2)])
def test_every_tensor_is_the_checkpoints(run_dir: Path, tmp_path: Path, weights: Any, step: int | None) -> None:
    paths = export_weights(run_dir, tmp_path / "out", weights, step=step)
    assert [path.name for path in paths] == ["config.json", "model.safetensors"]
    found, kept = load_file(paths[1]), tensors_of(run_dir, step or 4)
    assert found.keys() == {name.removeprefix("model.") for name in kept if name.startswith("model.")}
    for name, tensor in found.items():
        source = f"ema.{name}" if weights == "ema" and f"ema.{name}" in kept else f"model.{name}"
        assert torch.equal(tensor, kept[source])
    differ = [n for n in found if f"ema.{n}" in kept and not torch.equal(kept[f"ema.{n}"], kept[f"model.{n}"])]
    assert len(differ) > 20, "the two kinds of weights are not the same"


def test_the_model_is_built_from_what_was_written(run_dir: Path, tmp_path: Path) -> None:
    config_path, weights_path = export_weights(run_dir, tmp_path / "out")
    config = RunConfig.model_validate_json(config_path.read_text())
    text = build_text_encoder(config.text, torch.float32)
    model = build_dit(config, text, torch.device("cpu"), torch.float32)
    model.load_state_dict(load_file(weights_path))


def test_bf16_and_several_files(run_dir: Path, tmp_path: Path) -> None:
    whole = load_file(export_weights(run_dir, tmp_path / "one")[1])
    paths = export_weights(run_dir, tmp_path / "several", dtype="bf16", max_file_bytes=20_000)
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    files = [path for path in paths if path.suffix == ".safetensors"]
    assert [path.name for path in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert len(files) > 3
    held = {path.name: load_file(path) for path in files}
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    found = {name: tensor for tensors in held.values() for name, tensor in tensors.items()}
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in whole.items())
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in whole.values())
    for tensors in held.values():
        assert sum(2 * t.numel() for t in tensors.values()) <= 20_000 or len(tensors) == 1


def test_one_tensor_in_memory_at_a_time(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor is asked for when the one before has been let go of."""
    alive: list[Any] = []
    most, real = 0, Stored.whole

    def counted(self: Stored, name: str) -> Tensor:
        nonlocal most
        most = max(most, sum(reference() is not None for reference in alive))
        tensor = real(self, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Stored, "whole", counted)
    export_weights(run_dir, tmp_path / "out")
    assert len(alive) > 20
    assert most <= 1, "the one that is being written"


def test_the_command(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["export", str(run_dir), "--out", out, "--weights", "model", "--dtype", "bf16", "--step", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{out}/config.json", f"{out}/model.safetensors"]
    kept = tensors_of(run_dir, 2)
    found = load_file(f"{out}/model.safetensors")
    assert all(torch.equal(tensor, kept[f"model.{name}"].bfloat16()) for name, tensor in found.items())
    assert main(["export", str(run_dir), "--out", out]) == 1
    assert "not empty; give --out a new folder" in capsys.readouterr().err


def test_what_cannot_be_exported_is_said(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no checkpoint of step 3; it has 2 4"):
        export_weights(run_dir, tmp_path / "out", step=3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="full is there already and not empty; give --out a new folder"):
        export_weights(run_dir, tmp_path / "full")
    with pytest.raises(ValueError, match=r"is not a run directory"):
        export_weights(tmp_path, tmp_path / "out")
    path = next((run_dir / "checkpoints" / "step-00000002").glob("*.safetensors"))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=f"{path.name} is damaged"):
        export_weights(run_dir, tmp_path / "out", step=2)
    path.write_bytes(data)
    assert [p.name for p in tmp_path.iterdir()] == ["full"], "nothing is left behind"


def test_a_full_disk_leaves_nothing(run_dir: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(960_000))
    with pytest.raises(RuntimeError, match="No space left on device; free space"):
        export_weights(run_dir, small_disk / "out")
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]
