"""The controller of SLURM is away while a job runs, and comes back: the job trains on, and ends as if nothing was."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.slurm.local import LocalSlurm, Shape, missing
from vidit.config import RunConfig
from vidit.train.metrics import read_metrics

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"not installed: {' '.join(missing())}")
STEPS = 400


def until(condition: Callable[[], bool], explain: Callable[[], object] = lambda: "") -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.1)


def test_the_controller_is_restarted(
    configure: Callable[..., RunConfig],
    config_file: Callable[[Path, RunConfig], str],
    vidit: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    train = {"steps": STEPS, "validate_every": 1000, "checkpoint_every": 100}
    config = config_file(tmp_path, configure(train=train, sample={"prompts": ()}))
    run_dir = tmp_path / "run"

    def step() -> int:
        rows = read_metrics(run_dir) if (run_dir / "metrics.jsonl").is_file() else []
        return max((row["step"] for row in rows if "loss" in row), default=0)

    def output() -> str:
        return "\n".join(path.read_text() for path in run_dir.glob("jobs/*/output-*.log"))

    with LocalSlurm(Shape(nodes=1, gpus=0)) as slurm:
        done = vidit("submit", "slurm", config, f"run_dir={run_dir}", "--site", "cpu_test", extra=slurm.environment)
        assert done.returncode == 0, done.stderr
        until(lambda: step() > 5, output)
        slurm.stop_controller()
        before = step()
        assert before < STEPS
        lost = vidit("status", run_dir, extra=slurm.environment)
        assert lost.returncode == 1
        assert "slurm" in lost.stderr.lower()
        until(lambda: step() > before + 5, output)
        slurm.revive()
        until(lambda: "COMPLETED" in asked(slurm), output)
        assert " done" in vidit("status", run_dir, extra=slurm.environment).stdout
    assert step() == STEPS
    assert output().count(": start") == 1, "the job was started once"


def asked(slurm: LocalSlurm) -> str:
    done = subprocess.run(["scontrol", "-o", "show", "jobs"], env=slurm.environment, capture_output=True, text=True)
    return done.stdout
