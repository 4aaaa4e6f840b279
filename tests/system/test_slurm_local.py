"""The throwaway SLURM itself: jobs on several nodes with fake GPUs, and nothing of it stays, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.slurm import processes
from cluster.slurm.local import LocalSlurm, Shape, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"not installed: {' '.join(missing())}")
ROOT = Path(__file__).parents[2]
OWNER = """
import subprocess, sys, time
from cluster.slurm.local import LocalSlurm, Shape

with LocalSlurm(Shape(nodes=1)) as slurm:
    subprocess.run(["srun", "true"], env=slurm.environment, check=True)
    subprocess.Popen(["srun", "sleep", "1000"], env=slurm.environment, start_new_session=True)
    print(slurm.root, flush=True)
    time.sleep(1000)
"""


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_nodes_and_gpus() -> None:
    with LocalSlurm(Shape(nodes=2, gpus=4)) as slurm:
        words = "$SLURM_PROCID $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"
        done = subprocess.run(
            ["srun", "--nodes=2", "--ntasks-per-node=1", "--gres=gpu:2", "bash", "-c", f"echo {words}"],
            env=slurm.environment, capture_output=True, text=True,
        )  # fmt: skip
        assert sorted(done.stdout.splitlines()) == ["0 127.0.0.11 0,1", "1 127.0.0.12 0,1"], done.stderr
        root = slurm.root
        assert processes.find(root, "127.0.0.12")
        slurm.kill_node("127.0.0.12")
        assert not processes.find(root, "127.0.0.12")
        slurm.revive()
        until(lambda: bool(processes.find(root, "127.0.0.12")))
    assert not root.exists()
    assert processes.find(root) == []


def test_a_killed_owner_leaves_nothing_running() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    root = Path(owner.stdout.readline().strip())
    until(lambda: any(b"sleep" in Path(f"/proc/{p}/cmdline").read_bytes() for p in processes.find(root)))
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    until(lambda: processes.find(root) == [])
    subprocess.run([sys.executable, "-m", "cluster.slurm.local", "down", str(root)], cwd=ROOT, check=True)
    assert not root.exists()


def test_up_and_down(tmp_path: Path) -> None:
    """The command; a directory that is in use, or holds no SLURM, is refused. A job that runs is ended too."""
    root = Path(f"/tmp/{tmp_path.parent.name}-{os.getpid()}")

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cluster.slurm.local", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = call("up", str(root), "--nodes", "1", "--gpus", "0")
    assert (done.returncode, done.stdout) == (0, f"export SLURM_CONF={root}/slurm.conf\n"), done.stderr
    environment = {**os.environ, "SLURM_CONF": f"{root}/slurm.conf"}
    subprocess.run(
        ["sbatch", "--output=/dev/null", "--wrap", "sleep 1000"], env=environment, check=True, capture_output=True
    )
    again = call("up", str(root))
    assert (again.returncode, again.stderr) == (
        1, f"slurm: {root} is not empty; give a new directory, or end what runs there with `down`\n",
    )  # fmt: skip
    assert call("down", str(root)).returncode == 0
    assert not root.exists()
    assert processes.find(root) == []
    assert "holds no SLURM" in call("down", str(tmp_path)).stderr
