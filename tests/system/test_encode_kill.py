"""`vidit encode` under kill -9, on one process and on two ranks: the same command goes on, to the same bytes."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from vidit.cli import main
from vidit.config import RunConfig
from vidit.data.scene_pack import pack_scenes

PER_SHARD = 3
NUM = 48


def made(journal: Path) -> list[int]:
    """The shards in a journal, one for each time that it was made."""
    rows = []
    for line in journal.read_bytes().splitlines() if journal.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row["made"][0] for row in rows if "made" in row]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def file(
    configure: Callable[..., RunConfig], config_file: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> str:
    folder = tmp_path_factory.mktemp("encode")
    pack_scenes(folder / "clips", NUM, "train", 0, num_frames=5, height=32, width=32, workers=0)
    return config_file(folder, configure(folder / "run", data={"train": str(folder / "clips"), "num_workers": 1}))


@pytest.fixture(scope="module")
def whole(file: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, told = tmp_path_factory.mktemp("whole") / "out", io.StringIO()
    with redirect_stdout(told):
        assert main(["encode", file, str(out), "--clips-per-shard", str(PER_SHARD), "data.num_workers=0"]) == 0
    assert f"{NUM} clips in {NUM // PER_SHARD} shards" in told.getvalue()
    return out


def test_kill_9_again_and_again(
    command: Callable[..., subprocess.Popen[str]], file: str, whole: Path, tmp_path: Path
) -> None:
    out, journal = tmp_path / "out", tmp_path / ".out.partial" / "journal.jsonl"
    chance = random.Random(2)
    for number in range(2):
        before = len(made(journal))
        process = command("encode", file, out, "--clips-per-shard", PER_SHARD)
        deadline, goal = time.monotonic() + 60, before + chance.randint(1, 4)
        while process.poll() is None and len(made(journal)) < goal:
            assert time.monotonic() < deadline, "it does not encode"
            time.sleep(0.001)
        assert process.poll() is None, "it was done before it could be killed"
        (os.killpg if number % 2 else os.kill)(process.pid, signal.SIGKILL)
        process.communicate()
        assert not out.exists()
    assert len(made(journal)) == len(set(made(journal))) >= 2, "no shard is made twice"
    process = command("encode", file, out, "--clips-per-shard", PER_SHARD)
    printed, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert "shards are there already" in printed
    assert content(out) == content(whole)
    assert not journal.parent.exists()


def test_two_ranks_make_the_same_set_and_end_alike(
    command: Callable[..., subprocess.Popen[str]], file: str, whole: Path, tmp_path: Path
) -> None:
    """The first start is asked to stop; what ranks have made by then is kept."""
    out, journal = tmp_path / "out", tmp_path / ".out.partial" / "journal.jsonl"
    arguments = ("encode", file, out, "--clips-per-shard", PER_SHARD, "launch.local=2")
    process = command(*arguments)
    deadline = time.monotonic() + 90
    while process.poll() is None and len(made(journal)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stopped before all was encoded; the same command goes on from there" in errors
    kept = len(made(journal))
    assert 2 <= kept < NUM // PER_SHARD
    process = command(*arguments)
    printed, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert printed.count(f"{NUM} clips in {NUM // PER_SHARD} shards") == 1
    assert content(out) == content(whole)
