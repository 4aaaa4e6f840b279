"""The folder that a data set is written to first: what is left of it after every way out, and two at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vidit.data.scene_pack import pack_scenes
from vidit.data.shards import read_index
from vidit.data.staging import staged
from vidit.data.tar import ShardError

PACKING = """
import sys
from pathlib import Path
from vidit.data.scene_pack import pack_scenes

if __name__ == "__main__":
    pack_scenes(Path(sys.argv[1]), 100_000, "train", 0, num_frames=5, height=32, width=32, workers=2)
"""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def packing(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process with two workers that is packing into `out`, leader of a process group, and far from done."""
    script = tmp_path / "packing.py"
    script.write_text(PACKING)
    process = subprocess.Popen([sys.executable, script, tmp_path / "home" / "out"], start_new_session=True)
    shard = tmp_path / "home" / ".out.partial" / "data" / ".shard-000000.tar.partial"
    deadline = time.monotonic() + 60
    try:
        while not (shard.exists() and shard.stat().st_size):
            assert process.poll() is None, "it ends too early"
            assert time.monotonic() < deadline, "it does not pack"
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("to_all", [False, True])
def test_sigterm_leaves_nothing(packing: subprocess.Popen[bytes], tmp_path: Path, to_all: bool) -> None:
    """Sent to the process alone, or to its workers as well, as schedulers do."""
    (os.killpg if to_all else os.kill)(packing.pid, signal.SIGTERM)
    assert packing.wait(30) == 128 + signal.SIGTERM
    assert names(tmp_path / "home") == set()


def test_what_a_killed_process_left_is_removed_by_the_next(packing: subprocess.Popen[bytes], tmp_path: Path) -> None:
    packing.kill()
    packing.wait()
    assert names(tmp_path / "home") == {".out.partial"}
    pack_scenes(tmp_path / "home" / "out", 2, "train", 0, num_frames=5, height=32, width=32, workers=0)
    assert names(tmp_path / "home") == {"out"}
    assert len(read_index(tmp_path / "home" / "out")) == 2


def test_two_at_once_do_not_meet(packing: subprocess.Popen[bytes], tmp_path: Path) -> None:
    out = tmp_path / "home" / "out"
    before = names(out.parent / ".out.partial" / "data")
    with pytest.raises(RuntimeError, match=r"another process is writing .*out .*; wait for it, or write elsewhere"):
        pack_scenes(out, 2, "train", 0, overwrite=True, workers=0)
    assert packing.poll() is None
    assert before <= names(out.parent / ".out.partial" / "data")


def test_an_error_leaves_nothing_and_stays_itself(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="mine"), staged(tmp_path / "out", False):
        raise FileNotFoundError("mine")
    assert names(tmp_path) == set()


def test_an_empty_folder_of_the_user_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="num"), staged(tmp_path / "out", False):
        raise ValueError("num")
    assert names(tmp_path) == {"out"}


def test_the_working_folder_can_be_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    pack_scenes(Path(), 1, "train", 0, num_frames=5, height=32, width=32, workers=0)
    assert names(tmp_path) == {"out"}
    assert len(read_index(tmp_path / "out")) == 1


def test_signals_are_as_before_afterwards(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with staged(tmp_path / "out", False):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_it_works_in_a_thread(tmp_path: Path) -> None:
    def write() -> None:
        pack_scenes(tmp_path / "out", 1, "train", 0, num_frames=5, height=32, width=32, workers=0)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("moves", [1, 2, 3, 4])
def test_a_half_moved_data_set_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int) -> None:
    """A process that dies between two moves leaves no folder that a reader takes for whole, over an old one or not."""
    out = tmp_path / "out"
    sizes = {"num_frames": 1, "height": 32, "width": 32, "workers": 0, "clips_per_shard": 2}
    if moves % 2:
        pack_scenes(out, 6, "train", 1, **sizes)
    replace, left = Path.replace, [moves]

    def dying(path: Path, target: Path) -> Path:
        if target.parent == out:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        pack_scenes(out, 4, "train", 2, overwrite=True, **sizes)
    monkeypatch.undo()
    with pytest.raises(ShardError):
        read_index(out)
    pack_scenes(out, 4, "train", 2, overwrite=True, **sizes)
    assert len(read_index(out)) == 4
