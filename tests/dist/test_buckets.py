"""Runs on clips of several shapes and data sets: the same losses on any ranks, resumed on any others."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.rank_pool import Pool
from vidit.config import RunConfig
from vidit.data.encode import encode_mp4
from vidit.data.shard_writer import ShardWriter
from vidit.train.metrics import read_metrics
from vidit.train.run import run

Configure = Callable[..., RunConfig]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {"zero": 0}),
    "zero3 x3": (3, {}),
    "sp2 ulysses": (2, {"sequence": 2, "sequence_kind": "ulysses"}),
    "sp2 ring x zero3": (4, {"sequence": 2, "sequence_kind": "ring"}),
    "tp2 x zero3": (4, {"tensor": 2}),
}
BUCKETS = tuple(
    {"num_frames": t, "height": h, "width": w} for t, h, w in ((1, 32, 32), (3, 32, 32), (5, 32, 32), (5, 16, 32))
)


def start(config: RunConfig) -> bool:
    with redirect_stdout(io.StringIO()):
        return run(config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two data sets with clips of several lengths and shapes."""
    rng, found = np.random.default_rng(0), []
    for name, num in (("one", 24), ("two", 10)):
        folder = tmp_path_factory.mktemp(name) / name
        with ShardWriter(folder) as writer:
            for i in range(num):
                frames, height = (1, 3, 5, 5)[i % 4], 32 if i % 4 < 3 else 16
                video = encode_mp4(rng.integers(0, 256, (frames, height, 32, 3), dtype=np.uint8), 8)
                writer.add(f"clip-{i}", video, {"caption": f"clip {i} of {name}"})
        found.append(str(folder))
    return found


@pytest.fixture(scope="module")
def build(configure: Configure, folders: list[str]) -> Callable[..., RunConfig]:
    def build(folder: Path, steps: int = 6, **parallel: Any) -> RunConfig:
        mixture = [{"path": path, "weight": weight} for path, weight in zip(folders, (2.0, 1.0), strict=True)]
        return configure(
            folder, parallel=parallel, model={"self_conditioning": 0.5}, sample={"prompts": ()},
            train={"precision": "fp64", "steps": steps, "global_batch": 12, "micro_batch": 2, "checkpoint_every": 3},
            data={"train": "", "mixture": mixture, "buckets": BUCKETS, "num_validation": 0, "random_crop": True},
        )  # fmt: skip

    return build


def rows_of(config: RunConfig) -> list[dict[str, Any]]:
    return [row for row in read_metrics(config.directory) if "loss" in row]


@pytest.fixture(scope="module")
def whole(pool: Pool, build: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = build(tmp_path_factory.mktemp("whole"))
    assert pool.run(1, start, config) == [True]
    return config


def assert_alike(found: RunConfig, expected: RunConfig) -> None:
    ours, theirs = rows_of(found), rows_of(expected)
    assert len(ours) == len(theirs) == 6
    for one, other in zip(ours, theirs, strict=True):
        assert (one["step"], one["clips"]) == (other["step"], other["clips"])
        assert Counter(one["keys"]) == Counter(other["keys"])
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-9)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_ranks_are_one_run(
    pool: Pool, build: Callable[..., RunConfig], whole: RunConfig, tmp_path: Path, layout: str
) -> None:
    ranks, axes = LAYOUTS[layout]
    assert all(pool.run(ranks, start, build(tmp_path, **axes)))
    assert_alike(build(tmp_path), whole)


def test_resumed_on_another_number_of_ranks(
    pool: Pool, build: Callable[..., RunConfig], whole: RunConfig, tmp_path: Path
) -> None:
    assert all(pool.run(2, start, build(tmp_path, 3)))
    assert all(pool.run(3, start, build(tmp_path)))
    assert_alike(build(tmp_path), whole)


def test_steps_hold_several_shapes_of_both_data_sets(whole: RunConfig) -> None:
    rows = rows_of(whole)
    assert len({row["clips"] for row in rows}) == 6
    sizes = [row["clips"] - before for row, before in zip(rows, [0, *(row["clips"] for row in rows)], strict=False)]
    assert min(sizes) >= 12, "the dearest bucket has train.micro_batch rows, the others more"
    assert len(set(sizes)) > 1
    drawn = Counter(key.partition("/")[0] for row in rows for key in row["keys"])
    assert drawn["one"] / drawn["two"] == pytest.approx(2, rel=0.35)
