"""Jobs under a real SLURM: six nodes of this machine, all jobs at the same time, losses compared bit for bit.

Every job here trains the same run, so each has one answer: the metrics of the job that nothing happened to.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.slurm import processes
from cluster.slurm.local import LocalSlurm, Shape, missing
from vidit.config import RunConfig
from vidit.train.metrics import read_metrics
from vidit.train.run import run

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"not installed: {' '.join(missing())}")
WAIT_S, STEPS = 240.0, 60
ANYWHERE, LOST, PREEMPTED = ["127.0.0.11", "127.0.0.12"], ["127.0.0.13", "127.0.0.14", "127.0.0.15"], ["127.0.0.16"]
NODES = [*ANYWHERE, *LOST, *PREEMPTED]
Vidit = Callable[..., "subprocess.CompletedProcess[str]"]


@dataclass
class Cluster:
    """The SLURM, how jobs are submitted to it, and what has been."""

    slurm: LocalSlurm
    vidit: Vidit
    config: str
    folder: Path
    jobs: dict[str, str] = field(default_factory=dict)

    def submit(self, name: str, *options: str, nodes: list[str] = ANYWHERE, run_dir: str | None = None) -> Path:
        path = self.folder / (run_dir or name)
        away = ",".join(node for node in NODES if node not in nodes)
        site = () if "--site" in options else ("--site", "cpu_test")
        done = self.vidit(
            "submit", "slurm", self.config, f"run_dir={path}", *site, f"--sbatch=--exclude={away}", *options,
            extra=self.slurm.environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.jobs[name] = done.stdout.removeprefix("submitted ").partition(",")[0]
        return path

    def ask(self, *argv: str) -> str:
        done = subprocess.run(argv, env=self.slurm.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def field(self, name: str, key: str) -> str:
        line = self.ask("scontrol", "-o", "show", "job", self.jobs[name])
        return line.partition(f" {key}=")[2].split(" ")[0]

    def wait(self, name: str, state: str = "COMPLETED") -> None:
        """Until the job is in that state and nothing of it runs; another end fails at once."""
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        until(lambda: self.field(name, "JobState") in final, lambda: self.output(name))
        assert self.field(name, "JobState") == state, self.output(name)

    def output(self, name: str) -> str:
        logs = sorted(self.folder.glob(f"{name}/jobs/*/output-*.log"))
        return "\n".join(path.read_text() for path in logs)

    def ranks(self, name: str) -> list[int]:
        """Processes of the ranks of a job, in their order."""
        found = {}
        for process in processes.find(self.slurm.root):
            told = processes.environment_of(process)
            command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
            if told.get("SLURM_JOB_ID") == self.jobs[name] and "SLURM_STEP_ID" in told and b"vidit.cli" in command:
                found[int(told["SLURM_PROCID"])] = process
        return [found[rank] for rank in sorted(found)]


def until(condition: Callable[[], bool], explain: Callable[[], object] = lambda: "") -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.1)


def steps(run_dir: Path) -> int:
    rows = read_metrics(run_dir) if (run_dir / "metrics.jsonl").is_file() else []
    return max((row["step"] for row in rows if "loss" in row), default=0)


def losses(run_dir: Path) -> list[Any]:
    return [(row["step"], row["loss"], row["grad_norm"], row["keys"]) for row in read_metrics(run_dir) if "loss" in row]


@pytest.fixture(scope="module")
def cluster(
    configure: Callable[..., RunConfig],
    config_file: Callable[[Path, RunConfig], str],
    vidit: Vidit,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    train = {"steps": STEPS, "validate_every": 1000, "checkpoint_every": 10, "micro_batch": 1}
    config = config_file(folder, configure(train=train, sample={"prompts": ()}, parallel={"timeout_s": 60}))
    with LocalSlurm(Shape(nodes=len(NODES), gpus=0)) as slurm:
        yield Cluster(slurm, vidit, config, folder)


TWO = ("--nodes", "2")


@pytest.fixture(scope="module")
def whole(cluster: Cluster) -> Path:
    """Two nodes, and nothing happens."""
    return cluster.submit("whole", *TWO)


@pytest.fixture(scope="module", autouse=True)
def submitted(cluster: Cluster, whole: Path) -> None:
    """Those that take longest are on their way while others are looked at."""
    cluster.submit("lost", *TWO, nodes=LOST)
    cluster.submit("preempted", "--devices", "2", nodes=PREEMPTED)
    cluster.submit("stopped", *TWO)
    until(lambda: steps(cluster.folder / "lost") >= 12, lambda: cluster.output("lost"))
    cluster.slurm.kill_node(cluster.ask("scontrol", "show", "hostnames", cluster.field("lost", "NodeList")).split()[1])


def test_usr1(cluster: Cluster) -> None:
    run_dir = cluster.folder / "stopped"
    until(lambda: steps(run_dir) >= 3, lambda: cluster.output("stopped"))
    cluster.ask("scancel", "--batch", "--signal=USR1", cluster.jobs["stopped"])
    cluster.wait("stopped")
    assert "stopped and saved -> requeue" in cluster.output("stopped")
    assert cluster.field("stopped", "Restarts") == "1"
    told = json.loads((run_dir / "stopped.json").read_text())
    assert told == {"attempt": f"001/{cluster.jobs['stopped']}.1", "done": True, "step": STEPS, "signal": None}


def test_two_nodes_train_as_one_process(cluster: Cluster, whole: Path, configure: Callable[..., RunConfig]) -> None:
    cluster.wait("whole")
    one = cluster.folder / "one"
    config = RunConfig.model_validate_json((whole / "config.json").read_text())
    assert run(
        configure(one).model_validate({**config.model_dump(exclude_unset=True), "run_dir": str(one), "parallel": {}})
    )
    expected, found = losses(one), losses(whole)
    assert [row[0] for row in found] == list(range(1, STEPS + 1))
    assert [(row[0], row[3]) for row in found] == [(row[0], row[3]) for row in expected]
    assert [row[1] for row in found] == pytest.approx([row[1] for row in expected], rel=1e-5)
