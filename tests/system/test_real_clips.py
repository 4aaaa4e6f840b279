"""Real footage of mixed sizes, rates and lengths: `vidit pack`, then a few steps; what is left out is counted."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vidit.cli import main
from vidit.config import RunConfig
from vidit.data.shards import read_index
from vidit.data.video import probe
from vidit.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
CLIPS = Path(os.environ.get("VIDIT_TEST_CLIPS") or ROOT / "../shared/clips") / "real"
NAMES = (
    "bottle_put", "cups_shuffle_square", "dog_catch", "football_juggle_portrait", "parking_lot_turn",
    "person_leaves", "sign_again", "tractor_wheel",
)  # fmt: skip

pytestmark = pytest.mark.skipif(not CLIPS.is_dir(), reason=f"no real clips at {CLIPS}; set VIDIT_TEST_CLIPS")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight of the clips, of every shape there is, under names that the caption list knows."""
    folder = tmp_path_factory.mktemp("real")
    for name in (*(f"{name}.mp4" for name in NAMES), "clips.jsonl"):
        shutil.copyfile(CLIPS / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("real") / "shards"
    assert main(["pack", str(source), str(out), "--workers", "0"]) == 0
    return out


def test_the_clips_are_mixed_and_all_are_kept(packed: Path) -> None:
    report = json.loads((packed / "pack_report.json").read_text())
    assert (len(report["kept"]), report["rejected"]) == (len(NAMES), [])
    refs = read_index(packed)
    assert len({(ref.width, ref.height) for ref in refs}) > 2
    assert len({round(ref.fps, 2) for ref in refs}) > 1
    assert all(ref.caption_chars > 0 for ref in refs)


def test_training_on_them(
    packed: Path, configure: Callable[..., RunConfig], config_file: Callable[[Path, RunConfig], str], tmp_path: Path
) -> None:
    """8 frames a second from each clip's own rate, every shape cropped to one; the loss stays finite."""
    config = configure(
        tmp_path / "run",
        data={
            "train": str(packed), "fps": 8, "num_frames": 9, "height": 64, "width": 64, "num_validation": 2,
            "random_crop": True, "image_rows": 1,
        },
        train={"steps": 4},
    )  # fmt: skip
    assert main(["train", config_file(tmp_path, config)]) == 0
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)
    assert not any("skipped" in row for row in rows), "what is short is dropped before the run, not met in it"
    found = json.loads((tmp_path / "run" / "data.json").read_text())
    train = read_index(packed)[:-2]
    assert found["used"] + len(found["dropped"]) == len(train)
    kept = [ref for ref in train if ref.key not in dict(found["dropped"])]
    assert found["cropped"] == [ref.key for ref in kept if ref.width != ref.height]
    assert 0 < len(found["cropped"]) < len(kept)
    video = probe(tmp_path / "run" / "samples" / "step-00000004" / "000.mp4")
    assert (video.num_frames, video.width, video.height, video.fps) == (9, 64, 64, 8)


def test_a_clip_damaged_on_disk_is_named_and_never_trained_on(
    packed: Path, configure: Callable[..., RunConfig], config_file: Callable[[Path, RunConfig], str], tmp_path: Path
) -> None:
    """Flipped bits in the middle of a video: sizes and headers stay as they were, and most decoders show a picture."""
    shards = Path(shutil.copytree(packed, tmp_path / "shards"))
    refs = read_index(shards)
    bad = refs[0]
    content = bytearray(bad.shard_path.read_bytes())
    for part in (4, 5, 6):
        content[bad.video_offset + bad.video_size * part // 10] ^= 1
    bad.shard_path.write_bytes(content)
    config = configure(
        tmp_path / "run",
        data={
            "train": str(shards), "fps": 8, "num_frames": 5, "height": 32, "width": 32, "num_validation": 0,
            "max_skipped": 0.5,
        },
        train={"steps": 4, "global_batch": 2},
        sample={"prompts": ()},
    )  # fmt: skip
    assert main(["train", config_file(tmp_path, config)]) == 0
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert {key for row in rows for key, _ in row.get("skipped", ())} == {bad.key}
    used = {key for row in rows for key in row["keys"]}
    assert used == {ref.key for ref in refs} - {bad.key}


def test_clips_that_are_too_short_are_listed(
    packed: Path, configure: Callable[..., RunConfig], config_file: Callable[[Path, RunConfig], str], tmp_path: Path
) -> None:
    """At a length between the shortest and the longest clip, the shorter ones are dropped by name."""
    refs = read_index(packed)
    seconds = sorted(ref.num_frames / ref.fps for ref in refs)
    frames = 1 + 2 * round(8 * (seconds[0] + seconds[-1]) / 4)
    config = configure(
        tmp_path / "run",
        data={"train": str(packed), "fps": 8, "num_frames": frames, "height": 16, "width": 16, "num_validation": 0},
        train={"steps": 1, "global_batch": 1, "micro_batch": 1},
        sample={"prompts": ()},
    )
    assert main(["train", config_file(tmp_path, config)]) == 0
    found = json.loads((tmp_path / "run" / "data.json").read_text())
    short = {ref.key for ref in refs if int(ref.num_frames / ref.fps * 8 + 0.5) < frames}
    assert 0 < len(short) < len(refs)
    assert {key for key, _ in found["dropped"]} == short
    assert all(f"data.num_frames={frames}" in reason for _, reason in found["dropped"])
