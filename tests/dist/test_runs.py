"""Whole runs, `vidit.train.run` on real ranks: any layout has the losses of one process, and any resumes any other."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from benchmarks.rank_pool import Pool, TaskError
from parallel import checkpoint
from vidit.config import RunConfig
from vidit.data.limits import ClipError
from vidit.data.loader import MicroBatches
from vidit.train.metrics import read_metrics
from vidit.train.run import run
from vidit.train.step import DitStep, Losses

Configure = Callable[..., RunConfig]
Logged = tuple[int, float, float, list[str]]  # step, loss, norm of the gradient, keys of the clips
HALF, WHOLE = 4, 7  # an epoch is 3 steps
TRAIN = {
    "precision": "fp64", "global_batch": 4, "micro_batch": 1, "validate_every": WHOLE, "checkpoint_every": HALF,
    "keep_checkpoints": 9, "learning_rate": 3e-3,
}  # fmt: skip
MODEL = {"self_conditioning": 0.5, "num_layers": 4, "cross_attention": "all"}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {"zero": 0}),
    "dp4": (4, {"zero": 0}),
    "zero3 x2": (2, {}),
    "zero3 x4": (4, {}),
    "zero1 x2": (2, {"zero": 1}),
    "hsdp 2x2": (4, {"replicate": 2}),
    "tp4": (4, {"tensor": 4}),
    "tp2 x pp2": (4, {"tensor": 2, "pipeline": 2}),
    "tp2 x sp2": (4, {"tensor": 2, "sequence": 2, "sequence_kind": "ring"}),
    "zero2 x tp2": (4, {"tensor": 2, "zero": 2}),
    "sp4": (4, {"sequence": 4, "sequence_kind": "ulysses"}),
    "sp2 window x pp2": (4, {"sequence": 2, "sequence_kind": "window", "pipeline": 2}),
    "pp2 interleaved": (2, {"pipeline": 2, "schedule": "interleaved", "stages_per_rank": 2}),
    "pp4": (4, {"pipeline": 4, "schedule": "zero_bubble"}),
}
PAIRS = [
    ("dp4", "tp2 x pp2"), ("sp4", "one"), ("zero3 x2", "dp2"), ("one", "tp2 x sp2"), ("hsdp 2x2", "zero1 x2"),
    ("zero2 x tp2", "sp2 window x pp2"), ("pp4", "zero3 x4"), ("tp4", "pp2 interleaved"), ("tp2 x pp2", "dp4"),
]  # fmt: skip


def start(config: RunConfig) -> bool:
    """One rank of one start."""
    with redirect_stdout(io.StringIO()):
        return run(config)


def losses(config: RunConfig) -> list[Logged]:
    rows = [row for row in read_metrics(config.directory) if "loss" in row]
    return [(row["step"], row["loss"], row["grad_norm"], row["keys"]) for row in rows]


def tensors(config: RunConfig) -> dict[str, torch.Tensor]:
    manifest, stored = checkpoint.open_stored(checkpoint.folder_of(config.directory / "checkpoints", WHOLE))
    return {name: stored.whole(name) for name in manifest["tensors"]}


def assert_same_losses(ours: list[Logged], theirs: list[Logged], within: float = 1e-9) -> None:
    """Losses and norms of as many steps, of the same clips in the same order."""
    assert [(step, keys) for step, _, _, keys in ours] == [(step, keys) for step, _, _, keys in theirs]
    for (_, loss, norm, _), (_, expected, expected_norm, _) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(expected, rel=within)
        assert norm == pytest.approx(expected_norm, rel=within)


def assert_alike(found: RunConfig, expected: RunConfig, within: float = 1e-9) -> None:
    """Losses, norms, the order of clips, validation; weights, averages and moments of the last checkpoint."""
    assert_same_losses(losses(found), losses(expected), within)
    last = [[row for row in read_metrics(c.directory) if "validation" in row][-1] for c in (found, expected)]
    assert last[0]["step"] == last[1]["step"] == WHOLE
    assert last[0]["validation"] == pytest.approx(last[1]["validation"], rel=within)
    there, here = tensors(expected), tensors(found)
    assert there.keys() == here.keys()
    assert {"ema", "model", "exp_avg"} <= {name.partition(".")[0] for name in there}
    for name, tensor in there.items():
        assert torch.allclose(here[name], tensor, rtol=0, atol=1e-7 * float(tensor.abs().max()) + 1e-12), name


@pytest.fixture(scope="module")
def build(configure: Configure) -> Callable[..., RunConfig]:
    def build(folder: Path, steps: int = WHOLE, layout: str = "one", **more: Any) -> RunConfig:
        ranks, axes = LAYOUTS[layout]
        alone = ranks // math.prod(axes.get(axis, 1) for axis in ("tensor", "sequence", "pipeline")) == 1
        size = 2 if alone and "pipeline" not in axes else 1
        train = {**TRAIN, "steps": steps, "micro_batch": size, **more}
        return configure(folder, train=train, model=MODEL, sample={"prompts": ()}, parallel=LAYOUTS[layout][1])

    return build


@pytest.fixture(scope="module")
def whole(pool: Pool, build: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The run that one process makes without a stop."""
    config = build(tmp_path_factory.mktemp("whole"))
    assert pool.run(1, start, config) == [True]
    return config


@pytest.mark.parametrize(("first", "then"), PAIRS, ids=lambda name: name.replace(" ", ""))
def test_resumed_on_another_layout(
    pool: Pool, build: Callable[..., RunConfig], whole: RunConfig, tmp_path: Path, first: str, then: str
) -> None:
    for layout, steps in ((first, HALF), (then, WHOLE)):
        assert all(pool.run(LAYOUTS[layout][0], start, build(tmp_path, steps, layout)))
    assert_alike(build(tmp_path), whole)


def test_every_layout_is_resumed_or_resumes() -> None:
    assert {name for pair in PAIRS for name in pair} == set(LAYOUTS)
    assert len(PAIRS) >= 8


def test_muon_cached_latents_and_images(pool: Pool, configure: Configure, tmp_path: Path) -> None:
    """What a run does besides: matrices made orthogonal, latents encoded by all ranks, rows of images, previews."""
    found = []
    for name in ("one", "zero2 x tp2"):
        world, layout = LAYOUTS[name]
        config = configure(
            tmp_path / str(world), parallel=layout, data={"cache_latents": True, "image_rows": 1}, model=MODEL,
            train={**TRAIN, "micro_batch": 2, "steps": WHOLE, "optimizer": "muon"},
        )  # fmt: skip
        assert all(pool.run(world, start, config))
        assert len(list(config.directory.glob("samples/*/000.mp4"))) == 1
        found.append(config)
    # Muon's products are made in a narrower dtype, and which sums are rounded there depends on nothing but the matrix.
    assert_alike(found[1], found[0], within=1e-6)
    assert len(list((tmp_path / "4" / "latents").iterdir())) >= 1


def start_with_nan(config: RunConfig) -> bool:
    """As `start`; the loss of rank 1 is not finite in step 3."""
    loss, calls = DitStep.loss, itertools.count(1)

    def broken(self: DitStep, *given: Any) -> Losses:
        found = loss(self, *given)
        if dist.get_rank() == 1 and next(calls) == 3:
            return replace(found, rows_B=found.rows_B * math.nan)
        return found

    with patch.object(DitStep, "loss", broken):
        return start(config)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(pool: Pool, configure: Configure, tmp_path: Path) -> None:
    """At the same step, before the update, with the save before it whole."""
    config = configure(tmp_path, train={**TRAIN, "global_batch": 2, "steps": 6, "checkpoint_every": 2})
    with pytest.raises(TaskError) as caught:
        pool.run(2, start_with_nan, config)
    for text in caught.value.failures.values():
        assert "NonFiniteError: loss nan" in text
        assert "at step 3: not finite, no update made" in text
    assert [step for step, *_ in losses(config)] == [1, 2]
    assert checkpoint.verify(checkpoint.folder_of(config.directory / "checkpoints", 2))["step"] == 2


@pytest.mark.parametrize("kind", ["ring", "ulysses", "window"])
def test_selective_recomputation_of_divided_tokens(
    pool: Pool, build: Callable[..., RunConfig], whole: RunConfig, tmp_path: Path, kind: str
) -> None:
    steps = HALF // 2
    config = build(tmp_path, steps, activation_checkpointing="selective")
    parallel = config.parallel.model_copy(update={"sequence": 2, "sequence_kind": kind})
    assert all(pool.run(2, start, config.model_copy(update={"parallel": parallel})))
    assert_same_losses(losses(config), losses(whole)[:steps])


def start_with_other_clips(config: RunConfig) -> bool:
    """As `start`; a clip that tensor rank 0 reads cannot be read by rank 1."""
    decode, calls = MicroBatches.decode, itertools.count()

    def broken(self: MicroBatches, ref: Any, name: str = "", *rest: Any) -> Any:
        if dist.get_rank() == 1 and name == "clips/1" and next(calls) == 0:
            raise ClipError("not readable here")
        return decode(self, ref, name, *rest)

    with patch.object(MicroBatches, "decode", broken):
        return start(config)


@pytest.mark.parametrize(("held", "where"), [(4, "validation"), (0, "step 1")])
def test_ranks_that_share_rows_are_given_the_same_clips(
    pool: Pool, configure: Configure, tmp_path: Path, held: int, where: str
) -> None:
    config = configure(tmp_path, train=TRAIN, data={"num_validation": held}, parallel={"tensor": 2})
    with pytest.raises(TaskError) as caught:
        pool.run(2, start_with_other_clips, config)
    for text in caught.value.failures.values():
        assert f"were given other clips in {where}" in text


def test_what_is_sent_is_counted(pool: Pool, configure: Configure, tmp_path: Path) -> None:
    parallel = {"tensor": 2, "zero": 3, "count_communication": True}
    config = configure(tmp_path, train={**TRAIN, "steps": 3}, parallel=parallel)
    assert all(pool.run(4, start, config))
    rows = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    (counted,) = (row for row in rows if "communication" in row)
    assert counted["step"] == 2
    assert len(counted["communication"]) == 4
    for of_rank in counted["communication"]:
        assert of_rank["tensor"]["all_reduce"]["backward"]["bytes"] > 0
        assert any(kind.startswith("all_gather") for axis, kinds in of_rank.items() if "zero" in axis for kind in kinds)
    assert {row["slowest_rank"] for row in rows if "slowest_rank" in row} <= {0, 1, 2, 3}


def test_weights_that_take_no_part_decay_on_every_layout(pool: Pool, configure: Configure, tmp_path: Path) -> None:
    """Of a one-frame clip a window over frames needs no query, and whether it then has a gradient is the layout's."""
    found = []
    for world, parallel in ((1, {}), (2, {"sequence": 2, "sequence_kind": "ulysses"})):
        train = {**TRAIN, "steps": WHOLE, "checkpoint_every": WHOLE, "weight_decay": 0.1}
        data = {"num_frames": 1, "num_validation": 4}
        config = configure(tmp_path / str(world), train=train, data=data, parallel=parallel, sample={"prompts": ()})
        assert all(pool.run(world, start, config))
        found.append(config)
    assert_alike(found[1], found[0])


VAE_LAYOUTS = {
    "zero3": {"zero": 3}, "time": {"sequence": 2, "vae_context": "time"}, "rows": {"sequence": 2, "vae_context": "rows"}
}  # fmt: skip


@pytest.mark.parametrize("layout", VAE_LAYOUTS.values(), ids=VAE_LAYOUTS)
def test_vae(pool: Pool, configure: Configure, tmp_path: Path, layout: dict[str, Any]) -> None:
    found = []
    for world, parallel in ((1, {}), (2, layout)):
        train = {"task": "vae", "steps": 4, "precision": "fp64", "global_batch": 4, "micro_batch": 1}
        config = configure(tmp_path / str(world), train={**train, "validate_every": 4}, parallel=parallel)
        assert all(pool.run(world, start, config))
        found.append(config)
    for (step, loss, norm, keys), expected in zip(losses(found[1]), losses(found[0]), strict=True):
        assert (step, keys) == (expected[0], expected[3])
        assert (loss, norm) == pytest.approx(expected[1:3], rel=1e-9)
    files = [(config.directory / "vae" / "model.safetensors").stat().st_size for config in found]
    assert files[0] == files[1]
