"""Streamed runs: the same when resumed by as many readers, no clip lost with others, bad tars and clips counted."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parallel import checkpoint
from vidit.config import ConfigError, RunConfig
from vidit.data.encode import encode_mp4
from vidit.data.remote import DIRECT
from vidit.data.scenes import caption, render, sample_scene
from vidit.data.stream_tars import find_tars
from vidit.resolve import resolve
from vidit.train.audit import audit
from vidit.train.metrics import read_metrics
from vidit.train.run import run
from vidit.train.skips import SkipLimitError

Configure = Callable[..., RunConfig]
NUM_TARS, PER_TAR = 5, 4


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 tars of 4 clips of 5 frames, as video2dataset writes them; one clip more that has 3 frames only."""
    folder = tmp_path_factory.mktemp("stream") / "tars"
    folder.mkdir()
    for number in range(NUM_TARS):
        with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
            for clip in range(PER_TAR + (number == 2)):
                scene = sample_scene(0, PER_TAR * number + clip, "train", num_frames=5, height=32, width=32)
                frames = render(scene)[: 3 if clip == PER_TAR else 5]
                key = f"{number:05}{clip:04}"
                add(tar, f"{key}.mp4", encode_mp4(frames, float(scene.fps)))
                add(tar, f"{key}.txt", caption(scene).encode())
                add(tar, f"{key}.json", json.dumps({"key": key, "status": "success"}).encode())
    return folder


@pytest.fixture
def streamed(configure: Configure, tars: Path) -> Configure:
    def build(run_dir: Path, train: Path | str = tars, **changes: Any) -> RunConfig:
        data = {"train": str(train), "streaming": True, "num_validation": 0, **changes.pop("data", {})}
        steps = {"steps": 8, "checkpoint_every": 3, **changes.pop("train_section", {})}
        return configure(run_dir, data=data, train=steps, sample={"prompts": ()}, **changes)

    return build


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run_dir) if "keys" in row]


def cut_after(run_dir: Path, step: int) -> None:
    """As if the run had been killed after the checkpoint of this step and before the next one was whole."""
    for newer in checkpoint.steps(run_dir / "checkpoints"):
        if newer > step:
            checkpoint.remove(checkpoint.folder_of(run_dir / "checkpoints", newer))


@pytest.mark.parametrize(
    "data", [{}, {"shuffle_buffer": 6, "num_workers": 2, "random_crop": True}], ids=["plain", "shuffled"]
)
def test_resumed_on_the_same_readers_it_is_the_same_run(
    streamed: Configure, tmp_path: Path, data: dict[str, Any]
) -> None:
    whole, again = streamed(tmp_path / "whole", data=data), streamed(tmp_path / "again", data=data)
    assert run(whole)
    assert run(again)
    for step in (6, 3):
        cut_after(again.directory, step)
        assert run(again)
        assert rows(again.directory) == rows(whole.directory)
    assert audit(again.directory).fault == ""


def test_every_clip_of_an_epoch_once_and_its_line(
    streamed: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(streamed(tmp_path, train_section={"steps": 9}))
    found = rows(tmp_path)
    first = [key for row in found for key in row["keys"]][: NUM_TARS * PER_TAR]
    assert sorted(first) == [f"{n:05}.tar/{n:05}{clip:04}" for n in range(NUM_TARS) for clip in range(PER_TAR)]
    assert next(short for row in found for short in row.get("too_short", []))[0] == "00002.tar/000020004"
    (epoch,) = [epoch for row in found for epoch in row.get("epochs", [])]
    counts = {"delivered": 20, "skipped": 0, "too_short": 1, "refused": 0}
    assert epoch == {"number": 1, "tars": NUM_TARS, **counts}
    out = capsys.readouterr().out
    assert "epoch 1 of 5 tars: 21 clips, 20 delivered, 0 skipped, 1 too short; 0 tars refused" in out
    assert "5 tars without an index, by 1 readers" in out
    lines = list(audit(tmp_path).lines())
    assert any("no order to be held against" in line for line in lines)


def test_with_other_readers_no_clip_is_lost(
    streamed: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(streamed(tmp_path, data={"num_workers": 3}, train_section={"steps": 3}))
    assert run(streamed(tmp_path, data={"num_workers": 2}, train_section={"steps": 7}))
    assert "2 readers instead of 3: all begin at tar" in capsys.readouterr().out
    assert run(streamed(tmp_path, data={"num_workers": 0}, train_section={"steps": 14}))
    found = rows(tmp_path)
    assert sum("read_again_from" in row for row in found) == 2
    seen = {key for row in found for key in row["keys"]}
    assert len(seen) == NUM_TARS * PER_TAR
    (epoch, *_) = [epoch for row in found for epoch in row.get("epochs", [])]
    assert (epoch["delivered"], epoch["too_short"]) == (20, 1), "each clip counts once, however often it was read"
    assert audit(tmp_path).fault == ""


def test_bad_clips_and_tars_are_counted(streamed: Configure, tars: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in tars.iterdir():
        (bad / path.name).write_bytes(path.read_bytes())
    with tarfile.open(bad / "00001.tar", "a") as tar:
        add(tar, "evil.pickle", b"x")
    with tarfile.open(bad / "00003.tar", "a") as tar:
        add(tar, "broken.mp4", b"no video")
        add(tar, "broken.txt", b"words")
    config = streamed(tmp_path / "run", bad, data={"max_skipped": 0.5}, train_section={"steps": 7})
    assert run(config)
    lost = dict(entry for row in rows(tmp_path / "run") for entry in row.get("skipped", []))
    assert set(lost) == {"00001.tar", "00003.tar/broken"}
    assert "suffix 'pickle'" in lost["00001.tar"]
    assert audit(tmp_path / "run").fault == ""
    with pytest.raises(SkipLimitError, match=r"data\.max_skipped=0 "):
        run(streamed(tmp_path / "strict", bad, data={"max_skipped": 0.0}))


def test_refused_tars_are_judged_among_tars(streamed: Configure, tars: Path, tmp_path: Path) -> None:
    """2 of 5 are 2 of 14 among clips, which 0.3 would forgive."""
    bad, order = tmp_path / "bad", find_tars(str(tars), streamed("").train.seed, DIRECT)
    bad.mkdir()
    for path in tars.iterdir():
        refused = path.name in (order.name(2), order.name(4))
        (bad / path.name).write_bytes(b"no tar" if refused else path.read_bytes())
    with pytest.raises(SkipLimitError, match=r"2 of [56] tars could not be read to their end"):
        run(streamed(tmp_path / "run", bad, data={"max_skipped": 0.3}))


def test_a_vae_is_trained_and_measured_on_a_stream(configure: Configure, tars: Path, tmp_path: Path) -> None:
    data = {"train": str(tars), "streaming": True, "num_validation": 0}
    config = configure(tmp_path, data=data, train={"task": "vae", "steps": 2})
    assert run(config)
    assert (tmp_path / "vae" / "model.safetensors").is_file()


def test_another_list_of_tars_is_another_run(streamed: Configure, tars: Path, tmp_path: Path) -> None:
    assert run(streamed(tmp_path, train_section={"steps": 3}))
    with pytest.raises(ConfigError, match="the run has 5 tars of fingerprint"):
        run(streamed(tmp_path, f"{tars}/{{00000..00003}}.tar", train_section={"steps": 4}))


def test_fewer_tars_than_readers(streamed: Configure, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"6 readers \(data ranks 1 x data.num_workers 6\) for 5 tars"):
        run(streamed(tmp_path, data={"num_workers": 6}))


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        ({"image_rows": 1}, "data.image_rows needs"), ({"cache_latents": True}, "data.cache_latents needs"),
        ({"select": ("motion > 1",)}, "data.select needs"), ({"num_validation": 4}, "data.num_validation=4 takes"),
        ({"buckets": [{"num_frames": 5, "height": 32, "width": 32}]}, "data.buckets needs"),
        ({"mixture": [{"path": "a", "weight": 1}], "train": ""}, "data.mixture needs"),
        ({"streaming": False, "shuffle_buffer": 3}, "data.shuffle_buffer=3 has no effect"),
        ({"train": "https://host/0.tar", "cache_dir": "c"}, "data.cache_dir=c has no effect"),
    ],
)  # fmt: skip
def test_what_cannot_be_streamed(streamed: Configure, tmp_path: Path, data: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        resolve(streamed(tmp_path, data=data))


def test_a_stream_knows_no_frame_rates_but_the_one_it_is_cut_to(streamed: Configure, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.frame_rate needs .* set data.fps"):
        resolve(streamed(tmp_path, model={"frame_rate": True}))
    resolve(streamed(tmp_path, model={"frame_rate": True}, data={"fps": 8.0}))
