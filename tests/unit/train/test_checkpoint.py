"""Checkpoints: whole or not there, bit for bit, and every kind of damage is named before anything is changed."""

from __future__ import annotations

import errno
import hashlib
import json
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel import async_save, checkpoint
from parallel.checkpoint import CheckpointError
from vidit.config import Train
from vidit.train.ema import Ema
from vidit.train.optim import build_optimizer
from vidit.train.state import TrainState

ROOT = Path(__file__).parents[3]


def build(width: int = 6, seed: int = 0, optimizer: str = "adamw", num_layers: int = 3) -> TrainState:
    generator = torch.Generator().manual_seed(seed)
    every = [nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 3), nn.Linear(3, 2)]
    layers = nn.ModuleList(every[:num_layers])
    model = nn.ModuleDict({"layers": layers})
    model.forward = nn.Sequential(*layers).forward  # type: ignore[method-assign]
    for p in model.parameters():
        p.data.normal_(generator=generator)
    c = Train(optimizer=optimizer, learning_rate=1e-2)
    return TrainState(model, build_optimizer(c, dict(model.named_parameters())), Ema(model, 0.9))


def train(state: TrainState, steps: int) -> TrainState:
    for _ in range(steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(state.step))
        state.model(x).square().mean().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.ema.update(state.model, state.step)
        state.step += 1
        state.clips += 8
    return state


def copy_of(state: TrainState) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.tensors().items()}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, TrainState]:
    """(checkpoint folder of step 3, the state it was made of)"""
    state = train(build(), 3)
    return state.save(tmp_path / "checkpoints", {"name": "x"}, keep=5), state


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_round_trip_is_exact(optimizer: str, tmp_path: Path) -> None:
    state, other = train(build(optimizer=optimizer), 3), build(seed=1, optimizer=optimizer)
    folder = state.save(tmp_path / "checkpoints", {"name": "x"}, keep=5)
    facts = other.load(folder)
    assert (other.step, other.clips, facts["name"]) == (3, 24, "x")
    one, two = copy_of(state), copy_of(other)
    assert one.keys() == two.keys()
    moments = {"exp_avg", "exp_avg_sq"} | ({"momentum_buffer"} if optimizer == "muon" else set())
    assert {name.partition(".")[0] for name in one} == {"model", "ema"} | moments
    assert all(torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in one)
    assert "model.layers.1.running_mean" in one, "buffers travel too"
    assert [float(s["step"]) for s in other.optimizer.members[0].state.values()] == [3.0] * (
        6 if optimizer == "adamw" else 4
    )
    one, two = copy_of(train(state, 3)), copy_of(train(other, 3))
    assert all(torch.equal(one[name], two[name]) for name in one), "both go on alike"


def test_a_run_can_be_saved_before_its_first_step(tmp_path: Path) -> None:
    state = build()
    folder = state.save(tmp_path, {}, keep=1)
    other = build(seed=1)
    other.load(folder)
    one, two = copy_of(train(state, 2)), copy_of(train(other, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_manifest_names_every_file_and_tensor(saved: tuple[Path, TrainState]) -> None:
    folder, state = saved
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 3
    assert {path.name for path in folder.iterdir()} == {*manifest["files"], "manifest.json"}
    for name, facts in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert (facts["bytes"], facts["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert manifest["tensors"]["model.layers.0.weight"] == {"shape": [6, 4], "dtype": "float32"}
    assert manifest["tensors"].keys() == state.tensors().keys()


def test_every_flipped_byte_is_found(saved: tuple[Path, TrainState]) -> None:
    folder, _ = saved
    other = build(seed=1)
    before = copy_of(other)
    paths = sorted(path for path in folder.iterdir() if path.name != "manifest.json")
    assert any(path.suffix == ".safetensors" for path in paths)
    for path in paths:
        data = path.read_bytes()
        for place in (0, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with pytest.raises(CheckpointError, match=rf"{path.name} is damaged: its SHA-256 .*Nothing was changed"):
                other.load(folder)
            path.write_bytes(data)
        for short in (data[:-1], data[: len(data) // 2], b""):
            path.write_bytes(short)
            with pytest.raises(CheckpointError, match=rf"{path.name} is damaged: {len(short)} bytes instead"):
                other.load(folder)
        path.unlink()
        with pytest.raises(CheckpointError, match=rf"{path.name} is damaged: missing"):
            other.load(folder)
        path.write_bytes(data)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.tensors().items())
    assert other.step == 0
    other.load(folder)


def test_a_damaged_manifest_is_found(saved: tuple[Path, TrainState]) -> None:
    """Any flipped byte of it: the file's own hash, a name, a shape, a fact."""
    folder, state = saved
    path = folder / "manifest.json"
    data = path.read_bytes()
    path.write_text(json.dumps(json.loads(data)))
    build(seed=1).load(folder)  # white space is no damage
    for place in range(0, len(data), 11):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(CheckpointError, match=re.escape(str(folder))):
            build(seed=1).load(folder)
    for text in (b"", b"[]", b"null", b'{"format": 1}', data[: len(data) // 2]):
        path.write_bytes(text)
        with pytest.raises(CheckpointError, match=r"manifest\.json is missing or damaged"):
            build().load(folder)
    path.write_bytes(data.replace(b'"format": 1', b'"format": 9'))
    with pytest.raises(CheckpointError, match="format 9; this version reads format 1"):
        build().load(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        build().load(folder)
    assert checkpoint.steps(folder.parent) == [], "without a manifest it is no checkpoint"
    assert state.step == 3


def test_another_model_size_is_refused_with_both_shapes(saved: tuple[Path, TrainState]) -> None:
    folder, _ = saved
    other = build(width=7)
    before = copy_of(other)
    with pytest.raises(CheckpointError, match=r"layers\.0\.weight is \(6, 4\) there and \(7, 4\) here.* more\. Resume"):
        other.load(folder)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.tensors().items())
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.weight is not in it"):
        build(num_layers=4).load(folder)


def test_a_resume_leaves_no_tensor_behind(saved: tuple[Path, TrainState]) -> None:
    """A checkpoint of more layers than the model has: every tensor without a place is a fault."""
    folder, _ = saved
    state = build(num_layers=2)
    before = copy_of(state)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.weight has no place here; .* more\. Resume with"):
        state.load(folder)
    assert all(torch.equal(before[name], tensor) for name, tensor in state.tensors().items())


def test_a_part_is_asked_for_by_prefix(saved: tuple[Path, TrainState]) -> None:
    folder, state = saved
    averages = {name: t for name, t in build(seed=1).tensors().items() if name.startswith("ema.")}
    checkpoint.load(folder, averages, prefix="ema.")
    assert all(torch.equal(t, state.tensors()[name]) for name, t in averages.items())
    checkpoint.load(folder, {"ema.layers.0.weight": averages["ema.layers.0.weight"]})
    with pytest.raises(CheckpointError, match=r"ema\.layers\.0\.bias has no place here"):
        checkpoint.load(folder, {"ema.layers.0.weight": averages["ema.layers.0.weight"]}, prefix="ema.")


def test_another_dtype_is_refused(saved: tuple[Path, TrainState]) -> None:
    folder, _ = saved
    half = {"ema.layers.0.weight": torch.zeros(6, 4, dtype=torch.float16)}
    with pytest.raises(CheckpointError, match=r"ema\.layers\.0\.weight is float32 there and float16 here"):
        checkpoint.load(folder, half)
    assert not half["ema.layers.0.weight"].any()


@pytest.mark.parametrize(
    "fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
@pytest.mark.parametrize("place", ["tensors", "manifest", "rename"])
def test_a_crash_in_mid_save_leaves_the_previous(
    saved: tuple[Path, TrainState], monkeypatch: pytest.MonkeyPatch, fault: BaseException, place: str
) -> None:
    folder, state = saved
    root, before = folder.parent, content(folder)
    train(state, 1)
    expected = copy_of(state)

    def fail(*_: object, **__: object) -> None:
        raise fault

    with monkeypatch.context() as patch:
        if place == "tensors":
            real = async_save.write

            def half(*arguments: Any) -> None:
                real(*arguments)
                raise fault

            patch.setattr(async_save, "write", half)
        elif place == "manifest":
            patch.setattr(async_save, "write_manifest", fail)
        else:
            patch.setattr(Path, "rename", fail)
        with pytest.raises((CheckpointError, KeyboardInterrupt, MemoryError)) as caught:
            state.save(root, {}, keep=5)
    if isinstance(fault, OSError):
        assert isinstance(caught.value, CheckpointError)
        assert "No space left on device; free space" in str(caught.value)
        assert not list(root.glob("*.partial"))
    assert content(folder) == before
    assert checkpoint.steps(root) == [3]
    build(seed=1).load(folder)
    state.save(root, {}, keep=5)
    assert checkpoint.steps(root) == [3, 4]
    assert not list(root.glob("*.partial"))
    again = build(seed=1)
    again.load(checkpoint.folder_of(root, 4))
    assert all(torch.equal(expected[name], tensor) for name, tensor in again.tensors().items())


KILLED = """
import sys, threading, time
from pathlib import Path
import torch
from parallel import async_save, checkpoint
tensors = {f"t{i}": torch.full((300, 300), float(i)) for i in range(40)}
checkpoint.save(Path(sys.argv[1]), 1, tensors, {})
print("saved", flush=True)
for step in range(2, 10000):
    checkpoint.save(Path(sys.argv[1]), step, {k: v + step for k, v in tensors.items()}, {})
    checkpoint.prune(Path(sys.argv[1]), 2)
"""


def test_kill_in_mid_save_leaves_a_loadable_one(tmp_path: Path) -> None:
    """SIGKILL at a moment when a partial folder is there."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "saved\n"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        partial = list(tmp_path.glob("*.partial"))
        if partial and any(partial[0].glob("*.safetensors")):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob("*.partial")), "killed between two saves"
    newest = checkpoint.steps(tmp_path)[-1]
    tensors = {f"t{i}": torch.zeros(300, 300) for i in range(40)}
    checkpoint.load(checkpoint.folder_of(tmp_path, newest), tensors)
    offset = 0 if newest == 1 else newest
    assert all(bool((tensors[f"t{i}"] == i + offset).all()) for i in range(40))
    checkpoint.prune(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{newest:08d}"]


def test_a_full_disk_is_one_error_and_loses_nothing(small_disk: Path) -> None:
    tensors = {f"t{i}": torch.randn(200, 300) for i in range(2)}  # 0.46 MiB: one fits, two do not
    folder = checkpoint.save(small_disk, 1, tensors, {})
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(small_disk, 2, {**tensors, "more": torch.randn(200, 300)}, {})
    assert "cannot save" in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert [path.name for path in small_disk.iterdir()] == [folder.name]
    loaded = {name: torch.zeros(200, 300) for name in tensors}
    checkpoint.load(folder, loaded)
    assert all(torch.equal(tensors[name], loaded[name]) for name in tensors)


def test_nothing_is_unpickled(saved: tuple[Path, TrainState], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, state = saved

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was read")

    for name in ("load", "loads", "Unpickler", "_Unpickler", "_load", "_loads"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    other = build(seed=1)
    other.load(folder)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors().values(), other.tensors().values(), strict=True))
    for path in folder.iterdir():
        assert path.suffix in (".safetensors", ".json"), f"{path.name} may hold a pickle"


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    state = build()
    for _ in range(5):
        train(state, 1).save(tmp_path, {}, keep=2)
    assert checkpoint.steps(tmp_path) == [4, 5]
    (tmp_path / "step-00000009.partial").mkdir()
    (tmp_path / "step-00000008").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert checkpoint.steps(tmp_path) == [4, 5], "a folder without a manifest is none"
    checkpoint.prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes.txt", "step-00000004", "step-00000005", "step-00000008"
    ]  # fmt: skip
    checkpoint.prune(tmp_path, 1)
    assert checkpoint.steps(tmp_path) == [5]
    assert checkpoint.steps(tmp_path / "nowhere") == []


def test_only_a_checkpoints_own_name_counts(saved: tuple[Path, TrainState]) -> None:
    """Copies that a user made beside it, shorter and longer numbers; ten digits are a step too."""
    folder, _ = saved
    root = folder.parent
    for name in ("backup-step-00000009", "step-00000009.old", "step-9", "step-0000000009", "step-1234567890"):
        shutil.copytree(folder, root / name)
    (root / "my.partial").mkdir()
    (root / "step-00000009.partial").mkdir()
    assert checkpoint.steps(root) == [3, 1234567890]
    checkpoint.prune(root, 1)
    assert {path.name for path in root.iterdir()} == {
        "backup-step-00000009", "step-00000009.old", "step-9", "step-0000000009", "step-1234567890", "my.partial"
    }  # fmt: skip


def test_saving_a_step_twice_replaces_it(saved: tuple[Path, TrainState]) -> None:
    folder, state = saved
    with torch.no_grad():
        state.model["layers"][0].weight.fill_(7)
    state.save(folder.parent, {}, keep=5)
    other = build(seed=1)
    other.load(folder)
    assert bool((other.model["layers"][0].weight == 7).all())
    assert checkpoint.steps(folder.parent) == [3]
