"""Saves beside the training: what is saved is what was there at the call, one at a time, and a kill loses nothing."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel import async_save, checkpoint, manifest
from parallel.checkpoint import CheckpointError, Saver
from parallel.dtensor import Box
from parallel.save_plan import Held, make_plan
from vidit.config import Train
from vidit.train.ema import Ema
from vidit.train.optim import build_optimizer
from vidit.train.state import TrainState

ROOT = Path(__file__).parents[3]


def build(seed: int = 0, background: bool = True) -> TrainState:
    torch.manual_seed(seed)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 3)]), "norm": nn.BatchNorm1d(3)})
    optimizer = build_optimizer(Train(learning_rate=1e-2), dict(model.named_parameters()))
    return TrainState(model, optimizer, Ema(model, 0.9), background=background)


def train(state: TrainState, steps: int = 1) -> TrainState:
    for _ in range(steps):
        for number, p in enumerate(state.model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * state.step + number))
        state.optimizer.step()
        state.ema.update(state.model, state.step)
        state.step += 1
    return state


def copy_of(state: TrainState) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.tensors().items()}


def loaded(root: Path, step: int) -> dict[str, Tensor]:
    state = build(seed=9)
    state.load(checkpoint.folder_of(root, step))
    return state.tensors()


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@contextmanager
def held_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While entered, nothing is written until the event is set."""
    go, real = threading.Event(), async_save.write

    def write(*arguments: Any) -> Any:
        assert go.wait(30)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(async_save, "write", write)
        try:
            yield go
        finally:
            go.set()


def test_it_is_what_a_save_that_waits_writes(tmp_path: Path) -> None:
    for name, background in (("one", True), ("two", False)):
        train(build(background=background), 3).save(tmp_path / name, {"x": 1}, keep=2)
    assert checkpoint.steps(tmp_path / "two") == [3]
    state = train(build(), 3)
    folder = state.save(tmp_path / "three", {"x": 1}, keep=2)
    state.finish()
    one, two = (json.loads((f / "manifest.json").read_text()) for f in (folder, tmp_path / "two" / folder.name))
    assert one == two, "the files have the same hashes"


def test_the_training_goes_on_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = train(build(), 2)
    expected = copy_of(state)
    with held_up(monkeypatch) as go:
        state.save(tmp_path, {}, keep=2)
        train(state, 3)
        assert checkpoint.steps(tmp_path) == []
        assert (tmp_path / "step-00000002.partial").is_dir()
        go.set()
        state.finish()
    assert checkpoint.steps(tmp_path) == [2]
    assert not same(expected, state.tensors())
    assert same(expected, loaded(tmp_path, 2))


def test_the_next_save_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = train(build(), 1)
    with held_up(monkeypatch) as go:
        state.save(tmp_path, {}, keep=5)
        expected = copy_of(train(state))
        second = threading.Thread(target=state.save, args=(tmp_path, {}, 5))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.partial"]
        go.set()
        second.join(30)
        assert checkpoint.steps(tmp_path)[0] == 1
        state.finish()
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert same(expected, loaded(tmp_path, 2))


def test_memory_and_plan_are_kept_from_save_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans, real = [], async_save.make_plan
    monkeypatch.setattr(async_save, "make_plan", lambda held: plans.append(1) or real(held))
    state = build()
    buffers = set()
    for _ in range(3):
        train(state).save(tmp_path, {}, keep=1)
        assert state.saver._buffer is not None
        buffers.add(state.saver._buffer.data_ptr())
    state.finish()
    assert (len(plans), len(buffers)) == (1, 1)
    saver = state.saver
    saver.save(tmp_path, 9, {"other": torch.ones(3)}, {})
    saver.finish()
    assert len(plans) == 2, "other tensors are another plan"
    assert checkpoint.verify(checkpoint.folder_of(tmp_path, 9))["tensors"].keys() == {"other"}
    waiting = build(background=False)
    train(waiting).save(tmp_path, {}, keep=1)
    assert waiting.saver._buffer is None


@pytest.mark.parametrize("heard_in", ["save", "finish"])
@pytest.mark.parametrize("place", ["write", "write_manifest", "write_json"])
def test_a_fault_is_raised_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, heard_in: str
) -> None:
    state = train(build())
    state.save(tmp_path, {}, keep=5)
    state.finish()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(async_save, place, fail)
        train(state).save(tmp_path, {}, keep=5)
        state.saver._job.thread.join()
        with pytest.raises(CheckpointError) as caught:
            state.finish() if heard_in == "finish" else train(state).save(tmp_path, {}, keep=5)
    assert str(caught.value) == (
        f"cannot save {tmp_path}/step-00000002: [Errno 28] No space left on device; free space or choose another "
        "run_dir, then run the same command again: earlier checkpoints are untouched"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    state.finish()
    train(state).save(tmp_path, {}, keep=5)
    state.finish()
    assert same(loaded(tmp_path, state.step), state.tensors())


def test_what_is_no_disk_error_is_raised_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_save, "views", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    state = train(build())
    state.save(tmp_path, {}, keep=1)
    with pytest.raises(MemoryError, match="no room"):
        state.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_takes_too_long_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(timeout_s=0.1)
    with held_up(monkeypatch):
        saver.save(tmp_path, 1, {"x": torch.ones(3)}, {})
        with pytest.raises(CheckpointError, match=r"step-00000001: not written in 0\.1 s; free space"):
            saver.finish()


def test_a_folder_that_cannot_be_made_is_a_fault_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    state = build()
    with pytest.raises(CheckpointError, match=r"cannot save .*step-00000000: \[Errno 20\] Not a directory"):
        state.save(tmp_path / "file" / "checkpoints", {}, keep=1)
    state.finish()


class TestPrune:
    def test_multiples_are_kept(self, tmp_path: Path) -> None:
        state = build()
        for _ in range(9):
            train(state).save(tmp_path, {}, keep=2, keep_every=3)
        state.finish()
        assert checkpoint.steps(tmp_path) == [3, 6, 8, 9]
        checkpoint.prune(tmp_path, 1)
        assert checkpoint.steps(tmp_path) == [9]

    def test_nothing_is_pruned_before_the_new_one_is_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        state = train(build())
        state.save(tmp_path, {}, keep=1)
        state.finish()
        with held_up(monkeypatch) as go:
            train(state).save(tmp_path, {}, keep=1)
            assert checkpoint.steps(tmp_path) == [1]
            go.set()
            state.finish()
        assert checkpoint.steps(tmp_path) == [2]

    def test_one_cut_short_leaves_no_half_checkpoint(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for step in (1, 2):
            checkpoint.save(tmp_path, step, {"x": torch.ones(3)}, {})
        monkeypatch.setattr(manifest.shutil, "rmtree", lambda *_, **__: None)
        checkpoint.prune(tmp_path, 1)
        assert (tmp_path / "step-00000001.old.partial" / "manifest.json").is_file()
        assert checkpoint.steps(tmp_path) == [2]
        monkeypatch.undo()
        checkpoint.save(tmp_path, 1, {"x": torch.ones(3)}, {})
        checkpoint.prune(tmp_path, 1)
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


KILLED = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from parallel import async_save, manifest
from parallel.checkpoint import Saver

root = Path(sys.argv[1])

def then_die(function, before):
    def call(*arguments, **keywords):
        if not before:
            function(*arguments, **keywords)
        os.kill(os.getpid(), signal.SIGKILL)
    return call

def half(path, start, data):
    path.write_bytes(start + bytes(data[0][:100]))
    os.kill(os.getpid(), signal.SIGKILL)

def place(name):
    if name == "mid-file": async_save.write = half
    elif name == "file": async_save.write = then_die(async_save.write, False)
    elif name == "word": async_save.write_json = then_die(async_save.write_json, False)
    elif name == "before manifest": async_save.write_manifest = then_die(async_save.write_manifest, True)
    elif name == "manifest": async_save.write_manifest = then_die(async_save.write_manifest, False)
    elif name == "rename": async_save.sync = then_die(async_save.sync, True)
    elif name == "mid-prune": manifest.shutil = SimpleNamespace(rmtree=then_die(None, True))
    elif name == "prune": async_save.prune = then_die(async_save.prune, False)

for name in sys.stdin:
    name = name.strip()
    pid = os.fork()
    if pid == 0:
        saver, tensors = Saver(), {"x": torch.ones(1000), "y": torch.ones(3, 3)}
        saver.save(root / name, 1, tensors, {}, keep=1)
        saver.finish()
        saver.save(root / name, 2, {n: 2 * t for n, t in tensors.items()}, {}, keep=2)
        saver.finish()
        place(name)
        saver.save(root / name, 3, {n: 3 * t for n, t in tensors.items()}, {}, keep=1)
        saver.finish()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
# The newest checkpoint after a kill there.
PLACES = {
    "mid-file": 2, "file": 2, "word": 2, "before manifest": 2, "manifest": 2, "rename": 3, "mid-prune": 3, "prune": 3,
}  # fmt: skip


def test_sigkill_at_every_moment_of_a_save(tmp_path: Path) -> None:
    """The process kills itself from the writing thread; what is left loads, and the next save cleans up."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, input="\n".join(PLACES), text=True,
        stdout=subprocess.PIPE, timeout=120,
    )  # fmt: skip
    assert [int(line) for line in done.stdout.split()] == [-signal.SIGKILL] * len(PLACES)
    for place, newest in PLACES.items():
        root = tmp_path / place
        assert checkpoint.steps(root)[-1] == newest, place
        for step in checkpoint.steps(root):
            tensors = {"x": torch.zeros(1000), "y": torch.zeros(3, 3)}
            checkpoint.load(checkpoint.folder_of(root, step), tensors, prefix="")
            assert all(bool((t == step).all()) for t in tensors.values()), place
        checkpoint.save(root, 4, tensors, {})
        checkpoint.prune(root, 1)
        assert [path.name for path in root.iterdir()] == ["step-00000004"], place


class TestPlan:
    def held(self, name: str, offset: int, size: int, shape: int = 6) -> Held:
        return Held(name, "float32", (shape,), Box((offset,), (size,)))

    def test_what_several_hold_is_shared_out(self) -> None:
        """Two ranks divide a and both hold b, c and d: each writes its part and takes from the rest what evens out."""
        common = [self.held("b", 0, 6), self.held("c", 0, 6), self.held("d", 0, 6)]
        plan = make_plan([[self.held("a", 0, 1), *common], [self.held("a", 1, 5), *common]])
        sizes = [sum(part.num_bytes for part in parts) // 4 for parts in plan.parts]
        assert sum(sizes) == 24
        assert sizes == [13, 11]
        assert plan.tensors["a"] == {"shape": [6], "dtype": "float32"}

    def test_empty_parts_are_not_written(self) -> None:
        plan = make_plan([[self.held("a", 0, 6)], [self.held("a", 6, 0)]])
        assert [len(parts) for parts in plan.parts] == [1, 0]

    @pytest.mark.parametrize(
        ("ranks", "message"),
        [
            ([[("a", 0, 3)], [("a", 4, 2)]], "the ranks hold 5 numbers of a, which has 6"),
            ([[("a", 0, 3)], [("a", 2, 4)]], "the ranks hold 7 numbers of a, which has 6"),
            ([[("a", 0, 3)], [("a", 3, 4, 7)]], r"rank 1 holds a as float32 \(7,\), another rank as float32 \(6,\)"),
        ],
    )
    def test_what_is_not_whole_is_refused(self, ranks: Any, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            make_plan([[self.held(*part) for part in parts] for parts in ranks])
