"""Steps that are not finite or spikes: skipped or rolled back alike on all ranks, and what follows is bit for bit the
run that never made those updates."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recovery_case import Case, start

from benchmarks.rank_pool import Pool, TaskError
from parallel import checkpoint
from vidit.config import RunConfig
from vidit.train.goodput import read_goodput
from vidit.train.metrics import read_metrics
from vidit.whole_file import read_rows

Configure = Callable[..., RunConfig]
Build = Callable[..., RunConfig]
TRAIN: dict[str, Any] = {
    "precision": "fp64", "global_batch": 2, "micro_batch": 1, "checkpoint_every": 3, "keep_checkpoints": 3,
    "validate_every": 100, "steps": 8, "log_every": 4, "learning_rate": 3e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def build(configure: Configure) -> Build:
    def build(folder: Path, **train: Any) -> RunConfig:
        parallel = {"zero": 3}
        return configure(
            folder, train={**TRAIN, **train}, data={"num_validation": 0}, sample={"prompts": ()}, parallel=parallel
        )

    return build


def losses(config: RunConfig) -> dict[int, tuple[float, float]]:
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in read_metrics(config.directory) if "loss" in row}


def passed(config: RunConfig) -> list[dict[str, Any]]:
    return [row for row in read_metrics(config.directory) if "no_update" in row]


def tensors(config: RunConfig, step: int) -> dict[str, torch.Tensor]:
    manifest, stored = checkpoint.open_stored(checkpoint.folder_of(config.directory / "checkpoints", step))
    return {name: stored.whole(name) for name in manifest["tensors"]}


def assert_follows(found: RunConfig, reference: RunConfig, without: set[int], steps: int) -> None:
    """Every other step, and weights, averages and moments at the end, bit for bit."""
    expected = {step: value for step, value in losses(reference).items() if step not in without}
    assert losses(found) == expected
    one, other = tensors(found, steps), tensors(reference, steps)
    assert {"ema", "model", "exp_avg"} <= {name.partition(".")[0] for name in one}
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_that_is_not_finite_is_skipped(pool: Pool, build: Build, tmp_path: Path, world: int) -> None:
    found = build(tmp_path / "found", on_nonfinite="skip")
    said = pool.run(world, start, Case(found, scaled={5: math.nan}))
    assert "at step 5: not finite; its update is skipped" in said[0]
    reference = build(tmp_path / "reference")
    pool.run(world, start, Case(reference, unmade=(5,)))
    assert_follows(found, reference, {5}, 8)
    (row,) = passed(found)
    assert (row["step"], row["clips"]) == (5, 10)
    assert len(row["keys"]) == 2
    facts = checkpoint.read_manifest(checkpoint.folder_of(found.directory / "checkpoints", 8))["facts"]
    assert facts["recovery"]["passed"] == [[5, 5]]
    assert facts["num_passed"] == 1


@pytest.mark.parametrize("world", [1, 2])
def test_the_run_goes_back_and_passes_over(pool: Pool, build: Build, tmp_path: Path, world: int) -> None:
    """To step 3; steps 4 and 5 are not made. Step 4 had been recorded, and is not any more."""
    found = build(tmp_path / "found", on_nonfinite="roll_back")
    said = pool.run(world, start, Case(found, scaled={5: math.nan}))
    assert "back to the weights of step 3, steps 4 to 5 passed over" in said[0]
    reference = build(tmp_path / "reference")
    pool.run(world, start, Case(reference, unmade=(4, 5)))
    assert_follows(found, reference, {4, 5}, 8)
    assert [(row["step"], row["rolled_back_to"]) for row in passed(found)] == [(5, 3)]
    assert checkpoint.steps(found.directory / "checkpoints") == [5, 6, 8], "saved at once, so that a resume knows"
    assert read_goodput(found.directory).seconds["lost"] > 0


@pytest.mark.parametrize("world", [1, 2])
def test_a_poisoned_checkpoint_is_not_gone_back_to(pool: Pool, build: Build, tmp_path: Path, world: int) -> None:
    """The update of step 6 left a weight that is not finite, and was saved: the one before it is taken."""
    found = build(tmp_path / "found", on_nonfinite="roll_back", keep_checkpoints=3)
    said = pool.run(world, start, Case(found, poisoned=6))
    assert "step-00000006 holds numbers that are not finite" in said[0]
    assert "back to the weights of step 3, steps 4 to 7 passed over" in said[0]
    reference = build(tmp_path / "reference")
    pool.run(world, start, Case(reference, unmade=(4, 5, 6, 7)))
    assert_follows(found, reference, {4, 5, 6, 7}, 8)


def test_two_checkpoints_back(pool: Pool, build: Build, tmp_path: Path) -> None:
    found = build(tmp_path, on_nonfinite="roll_back", roll_back_checkpoints=2)
    said = pool.run(1, start, Case(found, scaled={7: math.nan}))
    assert "back to the weights of step 3, steps 4 to 7 passed over" in said[0]


def test_nothing_to_go_back_to(pool: Pool, build: Build, tmp_path: Path) -> None:
    found = build(tmp_path, on_nonfinite="roll_back")
    with pytest.raises(TaskError, match=r"at step 2: not finite.*There is no checkpoint to go back to"):
        pool.run(2, start, Case(found, scaled={2: math.nan}))


@pytest.mark.parametrize("action", ["skip", "roll_back"])
def test_a_spike(pool: Pool, build: Build, tmp_path: Path, action: str) -> None:
    """A spike at step 11 on one of two ranks; the same stopped after 9 steps and resumed is the same."""
    options = {"on_spike": action, "spike_window": 8, "steps": 13}
    found, resumed = build(tmp_path / "found", **options), build(tmp_path / "resumed", **options)
    pool.run(2, start, Case(found, scaled={11: 1e4}))
    pool.run(2, start, Case(build(tmp_path / "resumed", **{**options, "steps": 9}), scaled={11: 1e4}))
    pool.run(2, start, Case(resumed, scaled={11: 1e4}))
    (row,) = passed(found)
    assert row["step"] == 11
    assert "a spike above" in row["no_update"]
    assert row.get("rolled_back_to") == (9 if action == "roll_back" else None)
    assert losses(resumed) == losses(found)
    assert passed(resumed) == passed(found)
    one, other = tensors(found, 13), tensors(resumed, 13)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_spike_stops(pool: Pool, build: Build, tmp_path: Path) -> None:
    found = build(tmp_path, on_spike="stop", spike_window=8, steps=13)
    with pytest.raises(TaskError, match=r"SpikeError: loss \S+ at step 11: a spike above"):
        pool.run(2, start, Case(found, scaled={11: 1e4}))
    assert max(losses(found)) == 10


def test_recoveries_are_counted(pool: Pool, build: Build, tmp_path: Path) -> None:
    """Over a resume too: what the checkpoint says was recovered from stays on the account."""
    options = {"on_nonfinite": "skip", "max_recoveries": 2}
    scaled = dict.fromkeys((2, 5, 7), math.nan)
    pool.run(2, start, Case(build(tmp_path, **options, steps=6), scaled=scaled))
    with pytest.raises(TaskError, match=r"recovered at steps 2 5 already, and train\.max_recoveries=2") as caught:
        pool.run(2, start, Case(build(tmp_path, **options), scaled=scaled))
    assert set(caught.value.failures) == {0, 1}
    pool.run(2, start, Case(build(tmp_path, **options, recovery_window=5), scaled=scaled))


def test_a_slow_rank_is_named(pool: Pool, build: Build, tmp_path: Path) -> None:
    """One that reads slowly; the other waits for it, and so takes as long for a step."""
    found = build(tmp_path, steps=16)
    said = pool.run(2, start, Case(found, slow_s=0.3))[0]
    assert said.count("rank 1 is slow: ") == 1
    assert "most of it in data; median of 1" in said
    rows = [row for row in read_rows(tmp_path / "speed.jsonl") if "slowest_rank" in row]
    assert {row["slowest_rank"] for row in rows} == {1}
    assert all(row["own_s"] > 0.3 for row in rows)


@pytest.mark.parametrize("clock_s", [-3600.0, 3600.0])
def test_a_clock_that_is_off_changes_nothing(pool: Pool, build: Build, tmp_path: Path, clock_s: float) -> None:
    """Stopped and resumed on the way: nothing that ranks decide on is a time of day."""
    found, whole = tmp_path / "found", build(tmp_path / "whole")
    pool.run(2, start, Case(whole))
    for steps in (5, 8):
        pool.run(2, start, Case(build(found, steps=steps), clock_s=clock_s))
    assert_follows(build(found), whole, without=set(), steps=8)


def test_a_damaged_checkpoint_and_what_crashes_left(pool: Pool, build: Build, tmp_path: Path) -> None:
    """Two ranks go on from the checkpoint before, and are the run whose checkpoint was whole."""
    found, whole = build(tmp_path / "found"), build(tmp_path / "whole", steps=12)
    root = found.directory / "checkpoints"
    for config in (found, whole):
        pool.run(2, start, Case(config))
    path = next(checkpoint.folder_of(root, 8).glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    half, empty = root / "step-00000010.partial", root / "step-00000011"
    for folder in (half, empty):  # cut short while it was written, and while it was deleted
        folder.mkdir()
        (folder / "rank-00000.safetensors").write_bytes(b"torn")
    (half / "manifest.json").write_text("{}")
    said = pool.run(2, start, Case(build(tmp_path / "found", steps=12)))[0]
    assert f"{path} is damaged: " in said
    assert f"resumed {found.directory} at step 6" in said
    assert losses(found) == losses(whole)
    assert checkpoint.steps(root) == [6, 9, 12]
    assert sorted(p.name for p in root.glob("*.*")) == ["step-00000008.damaged"]
