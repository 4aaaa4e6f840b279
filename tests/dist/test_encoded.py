"""Videos and latents in one mixture, on ranks: any layout is the run of one process, and that the run on the videos."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rank_pool import Pool
from vidit.config import RunConfig
from vidit.train.encode_run import encode_run
from vidit.train.metrics import read_metrics
from vidit.train.run import run

Configure = Callable[..., RunConfig]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {"zero": 0}),
    "sp2": (2, {"sequence": 2, "sequence_kind": "ulysses"}),
    "sp2 in the VAE too": (2, {"sequence": 2, "sequence_kind": "ring", "vae_context": "rows"}),
    "tp2 x pp2": (4, {"tensor": 2, "pipeline": 2}),
    "zero3 x4": (4, {}),
}


def start(config: RunConfig) -> bool:
    """One rank of one start."""
    with redirect_stdout(io.StringIO()):
        return run(config)


def encode(task: tuple[RunConfig, Path]) -> int:
    """One rank of an encoding."""
    with redirect_stdout(io.StringIO()):
        return encode_run(task[0], task[1], "fp32", 3).num_clips


def rows_of(config: RunConfig) -> list[dict[str, Any]]:
    return [row for row in read_metrics(config.directory) if "loss" in row]


def assert_alike(found: RunConfig, expected: RunConfig, within: float) -> None:
    ours, theirs = rows_of(found), rows_of(expected)
    assert len(ours) == len(theirs) == 5
    for one, other in zip(ours, theirs, strict=True):
        assert [k.rpartition("/")[2] for k in one["keys"]] == [k.rpartition("/")[2] for k in other["keys"]]
        assert one["loss"] == pytest.approx(other["loss"], rel=within)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=within)


@pytest.fixture(scope="module")
def folders(
    pool: Pool, configure: Configure, tiny_clips: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A copy of the clips, and the same as latents, which three ranks made."""
    folder = tmp_path_factory.mktemp("sets")
    videos = Path(shutil.copytree(tiny_clips, folder / "videos"))
    config = configure(folder, data={"train": str(videos)}, train={"precision": "fp64"})
    assert pool.run(3, encode, (config, folder / "latents")) == [16] * 3
    return videos, folder / "latents"


@pytest.fixture(scope="module")
def build(configure: Configure, tiny_clips: Path) -> Callable[..., RunConfig]:
    def build(folder: Path, second: Path, **parallel: Any) -> RunConfig:
        return configure(
            folder, parallel=parallel, model={"self_conditioning": 0.5}, sample={"prompts": ()},
            train={"precision": "fp64", "steps": 5, "global_batch": 12, "micro_batch": 3, "checkpoint_every": 5},
            data={
                "train": "", "mixture": [{"path": str(path), "weight": 1} for path in (tiny_clips, second)],
                "num_validation": 0, "image_rows": 1,
            },
        )  # fmt: skip

    return build


@pytest.fixture(scope="module")
def whole(
    pool: Pool, build: Callable[..., RunConfig], folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    config = build(tmp_path_factory.mktemp("whole"), folders[1])
    assert pool.run(1, start, config) == [True]
    return config


def test_latents_stand_in_for_videos(
    pool: Pool, build: Callable[..., RunConfig], whole: RunConfig, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    direct = build(tmp_path, folders[0])
    assert pool.run(1, start, direct) == [True]
    assert_alike(whole, direct, 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_ranks_are_one_run(
    pool: Pool, build: Callable[..., RunConfig], whole: RunConfig, folders: tuple[Path, Path], tmp_path: Path,
    layout: str,
) -> None:  # fmt: skip
    ranks, axes = LAYOUTS[layout]
    config = build(tmp_path, folders[1], **axes)
    assert all(pool.run(ranks, start, config))
    assert_alike(config, whole, 1e-9)
