"""`vidit submit`: jobs on this machine from beginning to end, and what is refused before anything is submitted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vidit.config import RunConfig

ROOT = Path(__file__).parents[2]
Vidit = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def config(
    configure: Callable[..., RunConfig],
    config_file: Callable[[Path, RunConfig], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    return config_file(tmp_path_factory.mktemp("submitted"), configure(sample={"prompts": ()}))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_job_on_this_machine(vidit: Vidit, config: str, tmp_path: Path) -> None:
    """It is submitted, refuses a second one, stops when asked, goes on, and has kept its code and commit."""
    run_dir = tmp_path / "it's; $(touch pwned)"

    def state() -> str:
        return vidit("status", run_dir).stdout.split()[2]

    submit = ("submit", "local", config, f"run_dir={run_dir}", "train.validate_every=100000")
    done = vidit(*submit, "train.steps=100000")
    assert done.returncode == 0, done.stderr
    wait_until(lambda: (run_dir / "metrics.jsonl").is_file())
    second = vidit(*submit)
    assert second.returncode == 1
    assert "is running; `vidit cancel" in second.stderr
    assert "to save and leave" in vidit("cancel", run_dir).stdout
    wait_until(lambda: state() != "running")
    text = vidit("status", run_dir).stdout
    assert " done (exit code 0)\n" in text
    assert f"{run_dir}: stopped by SIGTERM at step " in text
    step = json.loads((run_dir / "stopped.json").read_text())["step"]
    assert "nothing to cancel" in vidit("cancel", run_dir).stdout

    assert vidit(*submit, f"train.steps={step + 2}").returncode == 0
    wait_until(lambda: state() != "running")
    out = vidit("logs", run_dir, "--follow").stdout
    assert f"resumed {run_dir} at step {step}\n" in out
    assert json.loads((run_dir / "stopped.json").read_text())["done"]
    assert {path.name for path in (run_dir / "jobs").iterdir()} == {"001", "002"}
    source = run_dir / "jobs/002/source"
    if (ROOT / ".git").exists():
        assert (source / "vidit/cli.py").read_bytes() == (ROOT / "vidit/cli.py").read_bytes()
        facts = json.loads((run_dir / "environment.json").read_text())
        assert facts["commit"] == (source / "commit").read_text().strip()
    assert not list(tmp_path.rglob("pwned"))


def test_a_job_whose_script_is_killed_is_still_there(vidit: Vidit, config: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert vidit("submit", "local", config, f"run_dir={run_dir}", "train.steps=100000").returncode == 0
    wait_until(lambda: (run_dir / "metrics.jsonl").is_file())
    (job,) = json.loads((run_dir / "jobs/001/job.json").read_text())["ids"]
    os.kill(int(job.partition("-")[0]), signal.SIGKILL)
    wait_until(lambda: "without its script, which was killed" in vidit("status", run_dir).stdout)
    assert "to save and leave" in vidit("cancel", run_dir).stdout
    wait_until(lambda: "killed, or the machine went down" in vidit("status", run_dir).stdout)
    assert json.loads((run_dir / "stopped.json").read_text())["signal"] == "SIGTERM"


def test_what_is_refused_leaves_nothing(
    vidit: Vidit, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = tmp_path / "bin/sbatch"
    refusing.parent.mkdir()
    refusing.write_text("#!/bin/bash\necho 'sbatch: error: no such partition' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{refusing.parent}:{os.environ['PATH']}")
    done = vidit("submit", "slurm", config, f"run_dir={tmp_path}/run", "--site", "cpu_test")
    assert done.returncode == 1
    assert "no such partition" in done.stderr
    assert not list((tmp_path / "run/jobs").iterdir())


def test_a_job_runs_the_copy_of_the_code(vidit: Vidit, config: str, tmp_path: Path) -> None:
    """Not what stands in the working directory by then."""
    if not (ROOT / ".git").exists():
        pytest.skip("no repository to copy from")
    run_dir = tmp_path / "run"
    script = vidit("submit", "local", config, f"run_dir={run_dir}", "--dry-run").stdout
    copy = run_dir / "jobs/001/source/vidit"
    copy.mkdir(parents=True)
    (copy / "__init__.py").touch()
    (copy / "cli.py").write_text("print('the copy')\n")
    (run_dir / "jobs/001/job.sh").write_text(script)
    done = subprocess.run(["bash", run_dir / "jobs/001/job.sh"], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.returncode) == ("the copy\n", 0), done.stderr


def test_faults_are_listed_together(vidit: Vidit, config: str, tmp_path: Path) -> None:
    run_dir = f"run_dir={tmp_path}/run"
    done = vidit("submit", "slurm", config, run_dir, "--nodes", 3, "--site", "a100", "--devices", 8, "--time", 2)
    for fault in (
        "--devices=8: a node of site a100 has 4",
        "--time=2 minutes",
        "train.global_batch=4 is not divisible",
    ):
        assert fault in done.stderr
    assert not (tmp_path / "run").exists()
    assert "--site is missing" in vidit("submit", "slurm", config, run_dir).stderr
    assert "every node must give equally many devices" in vidit("submit", "slurm", config, "--devices", "8,4").stderr
    assert "no site 'nowhere'" in vidit("submit", "slurm", config, "--site", "nowhere").stderr
    assert (
        "neither the number of a job"
        in vidit("submit", "slurm", config, run_dir, "--site", "cpu_test", "--after", "x").stderr
    )


def test_sweeps_with_faults(vidit: Vidit, config: str, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.txt"
    submit = ("submit", "slurm", config, f"run_dir={tmp_path}/run", "--site", "cpu_test", "--array", sweep)
    sweep.write_text("train.steps=1\n\n# a remark\ntrain.step=2\n")
    assert "run 1: unknown key 'train.step'" in vidit(*submit).stderr
    sweep.write_text("run_dir=a\nrun_dir=a\n")
    assert "is the directory of 2 runs" in vidit(*submit).stderr
    sweep.write_text("# nothing\n")
    assert "holds no overrides" in vidit(*submit).stderr


def test_no_slurm_here(vidit: Vidit, config: str, tmp_path: Path) -> None:
    """Said in words; the folder that was prepared is no submission."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/git").symlink_to("/usr/bin/git")
    submit = ("submit", "slurm", config, f"run_dir={tmp_path}/run", "--site", "cpu_test")
    done = vidit(*submit, extra={"PATH": str(tmp_path / "bin")})
    assert done.returncode == 1
    assert done.stderr == "vidit: no sbatch on this machine; submit from a login node of the cluster\n"
    assert "has no submitted job" in vidit("status", tmp_path / "run").stderr


def test_a_dry_run_needs_no_torch(config: str, tmp_path: Path) -> None:
    words = ["submit", "slurm", config, f"run_dir={tmp_path}/run", "--site", "dgx_h100", "--devices", "2", "--dry-run"]
    code = f"import sys\nfrom vidit.cli import main\nassert main({words!r}) == 0\nassert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n")
    assert done.stdout.endswith(f"# sbatch --parsable {tmp_path}/run/jobs/001/job.sh\n")
    assert not (tmp_path / "run").exists()
