"""Which clips a run trains on and is validated on, and how another dataset is told from a moved one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vidit.config import RunConfig
from vidit.data.encode import encode_mp4
from vidit.data.shard_writer import ShardWriter
from vidit.data.shards import read_index
from vidit.train.clips import fixed_batches, read_splits
from vidit.train.fingerprint import fingerprint
from vidit.train.task import build_task
from vidit.vae.stored import adopt_vae

Configure = Callable[..., RunConfig]


def packed(folder: Path, frames: list[int], text: str = "x") -> Path:
    with ShardWriter(folder) as writer:
        for i, num in enumerate(frames):
            video = torch.full((num, 32, 32, 3), 9 * i, dtype=torch.uint8)
            sidecar = {"caption": text, "width": 32, "height": 32, "fps": 8.0, "num_frames": num}
            writer.add(f"clip-{i:02d}", encode_mp4(video, 8.0), sidecar)
    return folder


def test_validation_clips_that_are_too_short_are_listed(configure: Configure, tmp_path: Path) -> None:
    folder = packed(tmp_path / "data", [5, 5, 3, 5, 2, 5, 5])
    config = configure(tmp_path, data={"train": str(folder), "num_validation": 4})
    train, held = read_splits(config)
    assert [ref.key for ref in train.refs] == ["clip-00", "clip-01"]
    assert train.report() == {"used": 2, "dropped": [("clip-02", "3 frames; data.num_frames=5")], "cropped": []}
    assert held.report()["used"] == 3
    assert held.report()["dropped"] == [("clip-04", "2 frames; data.num_frames=5")]
    batches = list(fixed_batches(config, held.refs, 3, None, 3))
    assert sorted(key for batch in batches for key in batch.keys) == ["clip-03", "clip-05", "clip-06"]


def test_strata_of_validation_are_those_of_its_clips(configure: Configure, tmp_path: Path) -> None:
    """Of 4 clips asked for 3 remain: thirds of the density, each once."""
    config = adopt_vae(configure(tmp_path, data={"num_validation": 4}))
    for given, slots in ((3, 3), (None, 4)):
        step = build_task(config, torch.device("cpu"), given).step
        places = (step.quantiles(list(range(slots)), "validation", slots) * slots).long()
        assert sorted(places.tolist()) == list(range(slots))


def test_no_validation_clip_left_is_refused(configure: Configure, tmp_path: Path) -> None:
    folder = packed(tmp_path / "data", [5, 5, 3])
    config = configure(tmp_path, data={"train": str(folder), "num_validation": 1})
    with pytest.raises(ValueError, match=r"none of the 1 validation clips of .* clip-02.* data\.num_validation=0"):
        read_splits(config)
    none = configure(tmp_path, data={"train": str(folder), "num_validation": 0})
    assert read_splits(none)[1].report() == {"used": 0, "dropped": [], "cropped": []}


def test_a_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    folder = packed(tmp_path / "a", [5, 5])
    known = fingerprint(read_index(folder))
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    assert fingerprint(read_index(moved)) == known
    assert fingerprint(read_index(packed(tmp_path / "again", [5, 5]))) == known
    assert fingerprint(read_index(packed(tmp_path / "text", [5, 5], "y"))) != known, "another caption of the same size"
    assert fingerprint(read_index(packed(tmp_path / "more", [5, 5, 5]))) != known
    assert fingerprint(read_index(folder)[:1]) != known
    (moved / "dataset.json").unlink()
    bare = fingerprint(read_index(moved))
    assert fingerprint(read_index(moved)) == bare
    assert fingerprint(read_index(packed(tmp_path / "other", [5, 6]))) not in (bare, known)


def scored(folder: Path, speeds: list[int]) -> Path:
    """Clips of a picture that moves so many pixels a frame, with their scores."""
    from vidit.data.curation.score_set import score_set

    picture = torch.randint(0, 256, (8, 20, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    wide = picture.expand(8, 20, 3).repeat_interleave(8, 0).repeat_interleave(8, 1)
    with ShardWriter(folder) as writer:
        for i, speed in enumerate(speeds):
            video = torch.stack([wide[:, speed * t : speed * t + 64] for t in range(12)])
            sidecar = {"caption": "x", "width": 64, "height": 64, "fps": 12.0, "num_frames": 12}
            writer.add(f"clip-{i:02d}", encode_mp4(video, 12.0), sidecar)
    score_set(folder)
    return folder


def test_rules_choose_clips_before_they_are_split(configure: Configure, tmp_path: Path) -> None:
    """Two of six do not move; the last of the others is for validation. Both and the counts are in the report."""
    folder = scored(tmp_path / "data", [1, 0, 2, 3, 2, 0])
    rules = ("motion >= 5", "cuts == 0")
    config = configure(tmp_path, data={"train": str(folder), "num_validation": 1, "select": rules})
    train, held = read_splits(config)
    assert [ref.key for ref in train.refs] == ["clip-00", "clip-02", "clip-03"]
    assert [ref.key for ref in held.refs] == ["clip-04"]
    assert train.dropped == [("clip-01", "not motion >= 5"), ("clip-05", "not motion >= 5")]
    assert train.report()["select"] == (
        "select motion >= 5: drops 2 of 6 clips, 2 of them alone",
        "select cuts == 0: drops no clip",
        "select keeps 4 of 6 clips",
    )
    everything = configure(tmp_path, data={"train": str(folder), "num_validation": 1})
    assert fingerprint([*train.refs, *held.refs]) != fingerprint([*read_splits(everything)[0].refs, *held.refs])


def test_a_run_says_what_its_rules_drop(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vidit.train.run import run

    folder = scored(tmp_path / "data", [1, 0, 2, 3, 2, 0])
    data = {"train": str(folder), "num_validation": 1, "select": ("motion >= 5",)}
    assert run(configure(tmp_path / "run", data=data, train={"steps": 1}, sample={"prompts": ()}))
    line = "select motion >= 5: drops 2 of 6 clips, 2 of them alone"
    assert line in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "data.json").read_text())
    assert report["select"] == [line, "select keeps 4 of 6 clips"]
    assert report["dropped"] == [["clip-01", "not motion >= 5"], ["clip-05", "not motion >= 5"]]
    other = configure(tmp_path / "run", data={**data, "select": ()}, train={"steps": 1}, sample={"prompts": ()})
    with pytest.raises(ValueError, match=r"data\.select: the run has"):
        run(other)


def test_rules_are_checked_with_the_config_and_need_scores(configure: Configure, tmp_path: Path) -> None:
    from vidit.resolve import resolve

    folder = packed(tmp_path / "data", [5, 5, 5])
    config = configure(tmp_path, data={"train": str(folder), "num_validation": 1, "select": ("motion >= q2",)})
    with pytest.raises(ValueError, match=r"data\.select: rule 'motion >= q2': q2 is no quantile"):
        resolve(adopt_vae(config))
    config = configure(tmp_path, data={"train": str(folder), "num_validation": 1, "select": ("motion >= 1",)})
    with pytest.raises(ValueError, match="has no scores; run `vidit score"):
        read_splits(config)
