"""Packed rows in training: the losses and gradients of their clips one by one, and runs that stop and go on."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vidit.cli import main
from vidit.config import ConfigError, RunConfig
from vidit.data.buckets import schedule_of
from vidit.data.loader import Batch, MicroBatches
from vidit.data.packed import Load, PackedRows
from vidit.data.rows import Clips
from vidit.describe import describe
from vidit.resolve import resolve
from vidit.text.encoder import build_text_encoder
from vidit.train.audit import audit
from vidit.train.clips import fixed_batches, read_splits
from vidit.train.layout import with_layout
from vidit.train.metrics import read_metrics
from vidit.train.packed_step import PackedStep
from vidit.train.parallelize import build_dit
from vidit.train.run import run
from vidit.train.run_data import filled
from vidit.vae.store import load_vae
from vidit.vae.stored import adopt_vae
from vidit.whole_file import read_rows

Configure = Callable[..., RunConfig]
CPU = torch.device("cpu")
SHAPES = ((1, 32, 32), (3, 32, 32), (5, 32, 32), (5, 16, 32))
BUCKETS = tuple({"num_frames": t, "height": h, "width": w} for t, h, w in SHAPES)
MODEL = {"windows": ((0, 0, 0),), "relative_position": "rope", "image_attention": "frame", "cross_attention": "all"}
CASES: dict[str, dict[str, Any]] = {
    "clips alone": {},
    "estimates": {"model": {"self_conditioning": 0.5}},
    "rates and times of frames": {
        "model": {"frame_times": True, "frame_rate": True, "self_conditioning": 0.5},
        "diffusion": {"given": ({"kind": "image_head", "share": 0.7},), "shift": "linear_tokens", "shift_value": 2.0},
    },
    "channels of frames, edm": {
        "model": {"given_channels": True},
        "diffusion": {
            "path": "edm", "target": "edm", "density": "log_normal", "given": ({"kind": "image_head", "share": 0.7},)
        },
    },
    "still": {"model": {"temporal_attention": True, "motion_free": 0.5}},
    "identity": {"model": {"windows": ((1, 0, 0), (0, 2, 2)), "image_attention": "identity"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def clips(mixed_clips: Callable[..., Path]) -> Path:
    return mixed_clips(SHAPES)


@pytest.fixture
def build(configure: Configure, clips: Path) -> Configure:
    """The tiny run on packed rows of at most 120 tokens: a clip of 5 frames of 32 x 32 has 48."""

    def build(run_dir: Path | str = "", **changes: Any) -> RunConfig:
        base: dict[str, Any] = {
            "model": MODEL, "sample": {"prompts": ()},
            "train": {"precision": "fp64", "global_batch": 3, "micro_batch": 1},
            "data": {"train": str(clips), "buckets": BUCKETS, "packed_tokens": 120, "num_validation": 0},
        }  # fmt: skip
        for name, change in changes.items():
            base[name] = {**base.get(name, {}), **change}
        return configure(run_dir, **base)

    return build


def alone(batch: Batch) -> list[Batch]:
    """Each clip of a packed row as a batch of one row."""
    found, captions = list[Batch](), batch.tokens
    assert captions is not None
    for size, clips in batch.runs:
        for place, key in enumerate(clips.keys):
            row = len(found)
            pixels = clips.pixels[place : place + 1] if clips.pixels is not None else None
            tokens = captions.rows([row])
            one = Clips([key], pixels, fps=clips.fps[place : place + 1])
            found.append(replace(batch, rows=[batch.rows[row]], clips=one, tokens=tokens, size=size, runs=()))
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_clip_has_the_loss_that_it_has_alone(build: Configure, case: str) -> None:
    config = adopt_vae(build(**CASES[case]))
    vae, text = load_vae(Path(config.vae.weights), CPU, torch.float64), build_text_encoder(config.text, torch.float64)
    model = build_dit(config, text, CPU, torch.float64)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # gates and output start at zero, which would hide the network from the loss
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    step = PackedStep(config, vae, text, CPU)
    catalog = read_splits(config)[0].catalog
    batch = MicroBatches(config, catalog, text.tokenizer, 1)[4]
    assert len(batch.runs) > 1
    assert [key for _, own in batch.runs for key in own.keys] == batch.keys

    def gradients(losses: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        rows = torch.cat(losses)
        rows.mean().backward()
        return rows.detach(), [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]

    rows, expected = gradients([step(model, one, "train").rows_B for one in alone(batch)])
    found_rows, found = gradients([step(model, batch, "train").rows_B])
    torch.testing.assert_close(found_rows, rows, rtol=1e-12, atol=0)
    floor = 1e-4 * max(float(g.norm()) for g in expected)
    assert (
        max(float((a - b).norm()) / max(floor, float(b.norm())) for a, b in zip(found, expected, strict=True)) < 1e-12
    )
    assert sum(bool(g.any()) for g in expected) > 0.8 * len(expected)


def test_a_run_stops_and_goes_on(build: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The losses of a run that was resumed are those of one that was not; every clip is accounted for."""
    change = {"data": {"num_validation": 4}, "train": {"precision": "fp32"}}
    whole, parts = (build(tmp_path / name, **change) for name in ("whole", "parts"))
    assert run(whole)
    assert "packed rows of at most 120 tokens, " in capsys.readouterr().out
    assert run(parts.model_copy(update={"train": parts.train.model_copy(update={"steps": 3})}))
    assert run(parts)
    one, other = (read_metrics(config.directory) for config in (whole, parts))
    assert [row.get("loss") for row in one] == [row.get("loss") for row in other]
    assert [row.get("keys") for row in one] == [row.get("keys") for row in other]
    assert any("validation" in row for row in one)
    found = audit(whole.directory)
    assert found.fault == ""
    fills = [row["fill"] for row in read_rows(whole.directory / "speed.jsonl") if "fill" in row]
    assert len(fills) == 6
    assert 0.8 < np.mean(fills) <= 1


def test_a_run_says_how_to_fill_its_rows() -> None:
    poor = PackedRows(0, Load((3686, 410), (60, 30), (6.0, 3.0)), 100, 4)
    assert filled(poor) == (
        "packed rows of at most 100 tokens, 63.3% full, 1.1 clips each: clips of the largest of data.buckets have 60 "
        "tokens, beside which others leave room; data.packed_tokens=120 would be 100.0% full"
    )
    assert filled(replace(poor, limit=120)) == "packed rows of at most 120 tokens, 100.0% full, 2.1 clips each"


def test_rows_of_many_clips_are_full(build: Configure) -> None:
    """4096 clips are 122,880 tokens, less than one row of 200,000: a block is longer then."""
    config = adopt_vae(build(data={"packed_tokens": 200_000}))
    rows = schedule_of(config, [0.25] * 4)
    assert isinstance(rows, PackedRows)
    assert rows.fill > 0.95
    assert "data.packed_tokens" not in filled(rows)


def test_what_packed_rows_exclude_is_refused(build: Configure) -> None:
    refused = {
        "train.micro_batch=2": {"train": {"micro_batch": 2, "global_batch": 4}},
        "use rope or none": {"model": {"relative_position": "bias"}},
        "train.compile=true would compile": {"train": {"compile": True}},
        "use at least 48": {"data": {"packed_tokens": 40}},
        "leave rows out": {"data": {"buckets": ({**BUCKETS[0], "rows": 2}, *BUCKETS[1:])}},
        "data.packed_tokens=120 has no effect without data.buckets": {"data": {"buckets": ()}},
    }
    for message, change in refused.items():
        with pytest.raises(ConfigError, match=message):
            resolve(adopt_vae(build(**change)))


def test_layouts_that_packed_rows_exclude_are_refused(build: Configure) -> None:
    refused = {
        "several side by side .*use ulysses": {"sequence": 2, "sequence_kind": "ring"},
        "parallel.sharded_norms=true cuts tokens": {"tensor": 2, "sharded_norms": True},
        "parallel.pipeline=2 sends tokens of one shape": {"pipeline": 2},
    }
    for message, change in refused.items():
        with pytest.raises(ConfigError, match=message):
            with_layout(adopt_vae(build(parallel=change)), 2)
    chosen = with_layout(adopt_vae(build(parallel={"sequence": 2})), 2)
    assert chosen.parallel.sequence_kind == "ulysses"
    with pytest.raises(ConfigError, match=r"4 heads.*parallel\.sequence=3.*use one of 1 2 4"):
        with_layout(adopt_vae(build(parallel={"sequence": 3})), 3)
    assert with_layout(adopt_vae(build(parallel={"tensor": 2})), 2).parallel.sharded_norms is False


def test_a_run_on_the_shapes_of_its_clips(
    build: Configure, tmp_path: Path, config_file: Callable[[Path, RunConfig], str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = config_file(tmp_path, build(data={"buckets": (), "packed_tokens": 0}))
    assert main(["data", "shapes", name, "--max-tokens", "40"]) == 0
    buckets, longest_first = shlex.split(capsys.readouterr().out)
    assert longest_first == "data.longest_first=true"
    listed = json.loads(buckets.removeprefix("data.buckets="))
    # A clip of 5 frames of 32 x 32 has 48 tokens: it is scaled down to 24 x 24.
    assert {(b["num_frames"], b["height"], b["width"]) for b in listed} == {*SHAPES[:2], (5, 24, 24), (5, 16, 32)}
    config = build(tmp_path / "run", data={"buckets": listed, "longest_first": True}, train={"steps": 2})
    assert run(config)
    assert audit(config.directory).fault == ""


def test_described(build: Configure) -> None:
    derived = describe(build())["derived"]
    assert [bucket["tokens"] for bucket in derived["buckets"]] == [16, 32, 48, 24]
    assert derived["packed_rows_total"] == 18
    assert derived["clips_per_step"] == 3 * 120 / 30
    assert "clips_per_step is the mean" in derived["estimated"]
    weighted = [bucket | {"weight": weight} for bucket, weight in zip(BUCKETS, (1, 1, 5, 1), strict=True)]
    assert describe(build(data={"buckets": weighted}))["derived"]["clips_per_step"] == round(3 * 120 / 39, 1)


def test_flops_of_packed_rows_are_the_most(build: Configure) -> None:
    config = build()
    derived = describe(config)["derived"]
    most = derived["training_flops_per_step_at_most"]
    assert isinstance(most, int)
    assert derived["training_flops_total_at_most"] == 6 * most
    assert "training_flops_per_step" not in derived
    rows = schedule_of(adopt_vae(config), [0.25] * 4)
    steps = [sum(3 * rows.cost(row) for row in rows.step(step)) for step in range(100)]
    assert 0.8 * most < max(steps) <= most


def test_validation_has_batches_as_large_as_a_packed_row(build: Configure) -> None:
    config = adopt_vae(build(data={"num_validation": 4}))
    batches = list(fixed_batches(config, read_splits(config)[1].refs, 2, None, 1))
    assert [len(batch.rows) for batch in batches] == [2]


def test_other_costs_would_be_another_order(build: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a version that counts FLOPs in another way."""
    assert run(build(tmp_path / "run", train={"steps": 1}))
    monkeypatch.setattr("vidit.batching.forward_flops", lambda c, grid, *more: grid[0] ** 2)
    told = r"costs \[0\.1111\d*, 0\.4444\d*, 1\.0, 1\.0\] of the dearest here and cost \[0\..*cannot be kept: go on"
    with pytest.raises(RuntimeError, match=told):
        run(build(tmp_path / "run", train={"steps": 2}))
