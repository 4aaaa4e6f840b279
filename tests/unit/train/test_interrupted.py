"""However a run is stopped, wherever it is, and however often: what it leaves is what it leaves undisturbed.

Within this process, so that a stop can fall on any call of a network: while latents are cached, in a step, in
validation, in a preview, while the statistics of a VAE are taken.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from parallel import checkpoint
from vidit.config import RunConfig
from vidit.model.dit import DiT
from vidit.train import review
from vidit.train import run_data as run_data_module
from vidit.train.run import run
from vidit.vae.autoencoder import CausalVae

Configure = Callable[..., RunConfig]
TRAIN = {"steps": 8, "checkpoint_every": 3, "validate_every": 2, "log_every": 4}
SECTIONS: dict[str, dict[str, Any]] = {
    "dit": {
        "data": {"cache_latents": True},
        "train": {**TRAIN, "sample_every": 4, "optimizer": "muon"},
        "sample": {"prompts": ("a red circle", "a blue square"), "num_steps": 8},
    },
    "vae": {"train": {**TRAIN, "task": "vae"}},
}


class Killed(BaseException):
    """Ends a start where it stands, as far as one process can do that to itself."""


class Trap:
    """Counts the calls of networks; at call `at` it does what it is told."""

    def __init__(self) -> None:
        self.calls, self.at, self.act = 0, 0, os.abort

    def set(self, at: int, act: Callable[[], Any]) -> None:
        self.calls, self.at, self.act = 0, at, act

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            self.act()


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def kill() -> None:
    raise Killed


@pytest.fixture(scope="module")
def trap() -> Iterator[Trap]:
    trap = Trap()

    def trapped(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            trap()
            return method(*arguments, **keywords)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_data_module, "CLIPS_PER_SHARD", 4)
        for owner, name in ((CausalVae, "encode"), (CausalVae, "decode"), (DiT, "forward")):
            patch.setattr(owner, name, trapped(getattr(owner, name)))
        yield trap


@pytest.fixture(scope="module", params=["dit", "vae"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def whole(kind: str, configure: Configure, trap: Trap, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """(the run that nothing disturbed, how often its networks were called)"""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    trap.set(0, kill)
    assert run(configure(run_dir, **SECTIONS[kind]))
    return run_dir, trap.calls


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def left(run_dir: Path) -> dict[str, Any]:
    """All that must not depend on the stops."""
    names = ["metrics.jsonl", "data.json", *(str(p.relative_to(run_dir)) for p in run_dir.glob("samples/*/*"))]
    names += [str(p.relative_to(run_dir)) for p in run_dir.glob("vae/*")]
    found: dict[str, Any] = {name: (run_dir / name).read_bytes() for name in names}
    found["encoded"] = [path.read_bytes() for path in sorted(run_dir.glob("latents/*.tar"))]
    newest = checkpoint.folder_of(run_dir / "checkpoints", 8)
    assert checkpoint.verify(newest)["step"] == 8
    return found | {n: t.tolist() for p in newest.glob("*.safetensors") for n, t in load_file(p).items()}


def test_the_whole_run(whole: tuple[Path, int], kind: str) -> None:
    run_dir, calls = whole
    assert [row["step"] for row in rows(run_dir) if "loss" in row] == list(range(1, 9))
    assert [row["step"] for row in rows(run_dir) if "validation" in row] == [2, 4, 6, 8]
    assert calls > 25
    if kind == "dit":
        assert len(list((run_dir / "latents").glob("*.tar"))) == 3
        assert {p.parent.name for p in run_dir.glob("samples/*/001.mp4")} == {"step-00000004", "step-00000008"}
    speed = [json.loads(line) for line in (run_dir / "speed.jsonl").read_text().splitlines()]
    assert all(("mfu" in row) == (kind == "dit") for row in speed), "where nobody has counted FLOPs there is no MFU"


@pytest.mark.parametrize("act", [terminate, kill])
def test_stops_at_random_calls(
    whole: tuple[Path, int], kind: str, configure: Configure, trap: Trap, tmp_path: Path,
    act: Callable[[], Any],
) -> None:  # fmt: skip
    config = configure(tmp_path / "run", **SECTIONS[kind])
    chosen = random.Random(f"{kind}/{act.__name__}")
    starts, done = 0, False
    while not done:
        starts += 1
        assert starts < 100
        trap.set(chosen.randint(1, whole[1] // 2), act)
        with suppress(Killed):
            done = run(config)
    assert starts > 1
    assert left(tmp_path / "run") == left(whole[0])
    costs = (tmp_path / "run" / "costs.jsonl").read_text().splitlines()
    assert len(costs) == starts, "each start, whatever came of it"


def stopped_at(config: RunConfig, trap: Trap, call: int) -> int:
    """Start, stop at a call; how many more calls it took to leave."""
    trap.set(call, terminate)
    assert not run(config)
    return trap.calls - call


def test_a_stop_is_answered_at_once_and_nothing_is_lost(
    whole: tuple[Path, int], kind: str, configure: Configure, trap: Trap, tmp_path: Path
) -> None:
    """At a call in each part of the run: a few later it is gone, with the step that it had reached on the disk."""
    for call in range(2, whole[1] - 2, 8):
        run_dir = tmp_path / str(call)
        assert stopped_at(configure(run_dir, **SECTIONS[kind]), trap, call) <= 4
        reached = max((row["step"] for row in rows(run_dir)), default=0)
        assert checkpoint.steps(run_dir / "checkpoints")[-1:] == ([reached] if reached else [])


@pytest.mark.parametrize("place", ["validate", "draw"])
def test_a_failure_beside_the_training_loses_no_step(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Validation at step 2 or samples at step 4 fail, where no checkpoint is due: the step is on the disk."""
    config = configure(tmp_path / "run", **SECTIONS["dit"])

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(review, place, fail)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no room"):
                run(config)
            assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == (2 if place == "validate" else 4)
    assert run(config)


def test_activation_checkpointing_may_be_switched_between_starts(configure: Configure, tmp_path: Path) -> None:
    """On, off, either at the resume: the same losses and the same tensors under the same names, bit for bit."""

    def trained(folder: str, first: str, then: str) -> tuple[bytes, dict[str, Any]]:
        for steps, on in ((3, first), (6, then)):
            train = {"steps": steps, "activation_checkpointing": on, "validate_every": 6}
            assert run(configure(tmp_path / folder, train=train, sample={"prompts": ()}))
        newest = checkpoint.folder_of(tmp_path / folder / "checkpoints", 6)
        tensors = {n: t.tolist() for p in newest.glob("*.safetensors") for n, t in load_file(p).items()}
        return (tmp_path / folder / "metrics.jsonl").read_bytes(), tensors

    plain = trained("plain", "none", "none")
    assert trained("on", "full", "selective") == plain
    assert trained("later", "none", "full") == plain
