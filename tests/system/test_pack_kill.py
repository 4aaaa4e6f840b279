"""`vidit pack` under kill -9: the same command goes on, and ends with the bytes of a packing in one go."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vidit.cli import main
from vidit.data.encode import encode_mp4
from vidit.data.scenes import caption, render, sample_scene

ROOT = Path(__file__).parents[2]
NUM = 60


def heard() -> None:
    """Ctrl-C reaches it, also where the tests run in the background, whose children ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(source: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "vidit.cli", "pack", source, out, "--clips-per-shard", "7", "--workers", "2"]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=heard,
    )  # fmt: skip


def decoded(journal: Path) -> list[str]:
    """The files in a journal, one for each time that it was decoded."""
    rows = []
    for line in journal.read_bytes().splitlines() if journal.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row["file"] for row in rows if "file" in row]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for index in range(NUM):
        scene = sample_scene(5, index, "train", num_frames=9, height=128, width=128)
        (folder / f"{index:02d}.mp4").write_bytes(encode_mp4(render(scene), 8))
        (folder / f"{index:02d}.txt").write_text(caption(scene))
    (folder / "13.mp4").write_bytes((folder / "12.mp4").read_bytes()[:500])
    return folder


def test_kill_9_again_and_again(source: Path, tmp_path: Path) -> None:
    """Killed twice with work done in between, the first process alone and then all; nothing is decoded twice."""
    out, journal = tmp_path / "out", tmp_path / ".out.partial" / "journal.jsonl"
    chance = random.Random(1)
    for number in range(2):
        before = len(decoded(journal))
        process = start(source, out)
        deadline = time.monotonic() + 60
        goal = before + chance.randint(1, 12)
        while process.poll() is None and len(decoded(journal)) < goal:
            assert time.monotonic() < deadline, "it does not pack"
            time.sleep(0.002)
        assert process.poll() is None, "it was done before it could be killed"
        (os.killpg if number % 2 else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        process.communicate()
        assert not out.exists()
    files = decoded(journal)
    assert len(files) == len(set(files)) > 0
    process = start(source, out)
    printed, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, b"")
    assert b"13.mp4" in printed
    assert not journal.parent.exists()
    assert main(["pack", str(source), str(tmp_path / "whole"), "--clips-per-shard", "7", "--workers", "0"]) == 0
    assert content(out) == content(tmp_path / "whole")
    assert len(list(out.glob("*.tar"))) == -(-(NUM - 1) // 7)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_stop_keeps_the_work_too(source: Path, tmp_path: Path, number: signal.Signals) -> None:
    out, journal = tmp_path / "out", tmp_path / ".out.partial" / "journal.jsonl"
    process = start(source, out)
    deadline = time.monotonic() + 60
    while len(decoded(journal)) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline, "it does not pack"
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert b"keeps what was done; the same command goes on from there" in errors
    assert len(decoded(journal)) >= 2
