"""Runs on packed rows: the same losses, gradient norms and clips on any ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_case import start

from benchmarks.rank_pool import Pool
from vidit.config import FAMILIES, RunConfig
from vidit.train.metrics import read_metrics

Configure = Callable[..., RunConfig]
SHAPES = ((1, 24, 24), (3, 32, 32), (5, 24, 24), (5, 16, 32))
"""Of 9, 32, 27 and 24 tokens: rows of odd lengths."""
PLAIN = {"windows": ((0, 0, 0),), "relative_position": "rope", "image_attention": "frame", "cross_attention": "all"}
MODELS: dict[str, dict[str, Any]] = {
    "text keys": {**PLAIN, "cross_keys": "text", "self_conditioning": 0.5},
    "joint": {**FAMILIES["cogvideox"], "text_padding": "masked", "pooled_text": False, "time_width": 0},
}
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "hsdp 2 x 2": ("text keys", 4, {"replicate": 2}),
    "sp2 ulysses x zero2": ("text keys", 4, {"sequence": 2, "zero": 2}),
    "tp2 x sp2": ("joint", 4, {"tensor": 2, "sequence": 2}),
}


@pytest.fixture(scope="module")
def clips(mixed_clips: Callable[..., Path]) -> Path:
    return mixed_clips(SHAPES)


@pytest.fixture(scope="module")
def build(configure: Configure, clips: Path) -> Configure:
    buckets = tuple({"num_frames": t, "height": h, "width": w} for t, h, w in SHAPES)

    def build(folder: Path, model: str, **parallel: Any) -> RunConfig:
        return configure(
            folder, parallel=parallel, model=MODELS[model], sample={"prompts": ()},
            train={"precision": "fp64", "steps": 3, "global_batch": 4, "micro_batch": 1},
            data={"train": str(clips), "buckets": buckets, "packed_tokens": 109, "num_validation": 0},
        )  # fmt: skip

    return build


@pytest.fixture(scope="module")
def whole(pool: Pool, build: Configure, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunConfig]:
    made: dict[str, RunConfig] = {}

    def whole(model: str) -> RunConfig:
        if model not in made:
            made[model] = build(tmp_path_factory.mktemp("whole"), model)
            assert pool.run(1, start, made[model]) == [True]
        return made[model]

    return whole


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_ranks_are_one_run(
    pool: Pool, build: Configure, whole: Callable[[str], RunConfig], tmp_path: Path, layout: str
) -> None:
    model, ranks, axes = LAYOUTS[layout]
    config = build(tmp_path, model, **axes)
    assert all(pool.run(ranks, start, config))
    ours, theirs = (read_metrics(c.directory) for c in (config, whole(model)))
    assert len(ours) == len(theirs) == 3
    for one, other in zip(ours, theirs, strict=True):
        assert (one["step"], one["clips"]) == (other["step"], other["clips"])
        assert Counter(one["keys"]) == Counter(other["keys"])
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-9)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-9)
