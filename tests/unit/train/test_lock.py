"""One process at a time holds a run, and nothing that happens to it keeps the next one out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vidit.train.lock import run_lock

ROOT = Path(__file__).parents[3]
HOLD = """
import sys, time
from pathlib import Path
from vidit.train.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_start_is_refused_by_name_until_the_first_is_dead(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with (
        pytest.raises(RuntimeError, match=rf"{run_dir} is being trained by process {process.pid} on "),
        run_lock(run_dir),
    ):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with run_lock(run_dir):
        assert f"process {os.getpid()} on" in (run_dir / "lock").read_text()
        with pytest.raises(RuntimeError, match=f"process {os.getpid()}"), run_lock(run_dir):
            pass
    assert (run_dir / "lock").read_text() == ""


def test_an_error_inside_frees_it(tmp_path: Path) -> None:
    with pytest.raises(KeyError), run_lock(tmp_path):
        raise KeyError
    with run_lock(tmp_path):
        pass


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import errno

    from vidit.train import lock

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with run_lock(tmp_path):
        assert "takes no lock" in caplog.text
