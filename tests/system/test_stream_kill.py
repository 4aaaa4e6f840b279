"""A streamed run on two ranks that is killed with all its processes, and started again on two and on one."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parallel import checkpoint
from vidit.cli import main
from vidit.config import RunConfig
from vidit.data.shards import read_clip, read_index

STEPS = 16


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []


def plain_tars(clips: Path, folder: Path) -> None:
    """The clips as bare tars of three, as other tools write them."""
    folder.mkdir()
    refs = read_index(clips)
    for number in range(0, len(refs), 3):
        with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
            for ref in refs[number : number + 3]:
                video, caption, _ = read_clip(ref)
                for suffix, content in (("mp4", video), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{ref.key}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def test_kill_9_and_again_on_two_ranks_and_on_one(
    configure: Callable[..., RunConfig], config_file: Callable[..., str], tiny_clips: Path,
    command: Callable[..., subprocess.Popen[str]], vidit: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    plain_tars(tiny_clips, tmp_path / "tars")
    data = {"train": str(tmp_path / "tars"), "streaming": True, "shuffle_buffer": 2, "num_validation": 0}
    config = config_file(
        tmp_path,
        configure(
            "", data=data, train={"steps": STEPS, "checkpoint_every": 3, "keep_checkpoints": 9},
            sample={"prompts": ()}, launch={"local": 2},
        ),
    )  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = vidit("train", config, f"run_dir={whole}")
    assert done.returncode == 0, done.stderr

    process = command("train", config, f"run_dir={cut}")
    deadline = time.monotonic() + 100
    while max((row["step"] for row in metrics(cut)), default=0) < 5:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert checkpoint.steps(cut / "checkpoints")[-1] < STEPS, "killed in mid-run"
    done = vidit("train", config, f"run_dir={cut}")
    assert done.returncode == 0, done.stderr
    assert "2 readers go on where they were" in done.stdout
    assert metrics(cut) == metrics(whole)

    for newer in checkpoint.steps(cut / "checkpoints")[2:]:
        checkpoint.remove(checkpoint.folder_of(cut / "checkpoints", newer))
    assert main(["train", config, f"run_dir={cut}", "launch.local=1"]) == 0
    assert "1 readers instead of 2: all begin at tar" in capfd.readouterr().out
    assert len({key for row in metrics(cut) for key in row["keys"]}) == 16, "every clip at least once"
    assert main(["data", "audit", str(cut)]) == 0
    assert "no order to be held against" in capfd.readouterr().out


def test_ranks_that_share_rows_read_the_same_clips(
    configure: Callable[..., RunConfig], config_file: Callable[..., str], tiny_clips: Path,
    vidit: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path,
) -> None:  # fmt: skip
    """Of a tensor group each rank has a reader of its own; what they read is what one process reads."""
    plain_tars(tiny_clips, tmp_path / "tars")
    data = {"train": str(tmp_path / "tars"), "streaming": True, "shuffle_buffer": 2, "num_validation": 0}
    config = config_file(tmp_path, configure("", data=data, train={"steps": 5}, sample={"prompts": ()}))
    assert main(["train", config, f"run_dir={tmp_path / 'one'}"]) == 0
    done = vidit("train", config, f"run_dir={tmp_path / 'two'}", "launch.local=2", "parallel.tensor=2")
    assert done.returncode == 0, done.stderr
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    assert [row["keys"] for row in two] == [row["keys"] for row in one]
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)
