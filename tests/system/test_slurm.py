"""Jobs under a real SLURM: six nodes of this machine, all jobs at the same time, losses compared bit for bit.

Every job here trains the same run, so each has one answer: the metrics of the job that nothing happened to.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from cluster.processes import environment_of
from cluster.slurm import processes
from cluster.slurm.local import LocalSlurm, Shape, missing
from vidit.cli import main
from vidit.config import Launch, Parallel, RunConfig
from vidit.train.metrics import read_metrics
from vidit.train.run import run

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"not installed: {' '.join(missing())}")
WAIT_S, STEPS = 240.0, 40
ANYWHERE, LOST, PREEMPTED = ["127.0.0.11", "127.0.0.12"], ["127.0.0.13", "127.0.0.14", "127.0.0.15"], ["127.0.0.16"]
NODES = [*ANYWHERE, *LOST, *PREEMPTED]


@dataclass
class Cluster:
    """The SLURM, how jobs are submitted to it, and what has been."""

    slurm: LocalSlurm
    config: str
    folder: Path
    jobs: dict[str, str] = field(default_factory=dict)

    def vidit(self, *words: object) -> str:
        """What the command prints, in this process and with the variables of the cluster."""
        with patch.dict(os.environ, self.slurm.environment), redirect_stdout(io.StringIO()) as told:
            assert main([str(word) for word in words]) == 0
        return told.getvalue()

    def submit(self, name: str, *options: str, nodes: list[str] = ANYWHERE, run_dir: str | None = None) -> Path:
        path = self.folder / (run_dir or name)
        away = ",".join(node for node in NODES if node not in nodes)
        site = () if "--site" in options else ("--site", "cpu_test")
        words = ("submit", "slurm", self.config, f"run_dir={path}", *site, f"--sbatch=--exclude={away}", *options)
        self.jobs[name] = self.vidit(*words).removeprefix("submitted ").partition(",")[0]
        return path

    def ask(self, *argv: str) -> str:
        done = subprocess.run(argv, env=self.slurm.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def nodes(self, name: str) -> list[str]:
        return self.ask("scontrol", "show", "hostnames", self.field(name, "NodeList")).split()

    def field(self, name: str, key: str, job: str = "") -> str:
        line = self.ask("scontrol", "-o", "show", "job", job or self.jobs[name])
        return line.partition(f" {key}=")[2].split(" ")[0]

    def wait(self, name: str, state: str = "COMPLETED", job: str = "") -> None:
        """Until the job is in that state and nothing of it runs; another end fails at once."""
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        until(lambda: self.field(name, "JobState", job) in final, lambda: self.output(name))
        assert self.field(name, "JobState", job) == state, self.output(name)

    def status(self, name: str) -> str:
        return self.vidit("status", self.folder / name)

    def output(self, name: str) -> str:
        logs = sorted(self.folder.glob(f"{name}/jobs/*/output-*.log"))
        return "\n".join(path.read_text() for path in logs)

    def ranks(self, name: str) -> list[int]:
        """Processes of the ranks of a job, in their order."""
        found = {}
        for process in processes.find(self.slurm.root):
            told = environment_of(process)
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
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    train = {"steps": STEPS, "validate_every": 1000, "checkpoint_every": 10, "micro_batch": 1}
    config = config_file(folder, configure(train=train, sample={"prompts": ()}))
    with LocalSlurm(Shape(nodes=len(NODES), gpus=0)) as slurm:
        yield Cluster(slurm, config, folder)


TWO = ("--nodes", "2")


@pytest.fixture(scope="module")
def whole(cluster: Cluster) -> Path:
    """Two nodes, and nothing happens."""
    return cluster.submit("whole", *TWO)


AWKWARD = "a 'q\" b;touch pwned;$(touch pwned)`touch pwned` #&|%j"
PROMPTS = "[\n" + json.dumps(f"{AWKWARD}\n$(touch pwned)") + "\n]"
SICK = """
[slurm]
devices_as = "none"
signal_before_s = 30
[environment]
GLOO_SOCKET_IFNAME = "lo"
OMP_NUM_THREADS = "1"
[health]
command = ["{python}", "-m", "cluster.health", "--check", "limits", "names", "gpus", "--gpus", "2"]
"""
# What the driver shows: one GPU of two, until the job starts for the second time, on another node.
FEWER_GPUS = """#!/bin/sh
echo "0, GPU-0, fake"
[ -z "$SLURM_RESTART_COUNT" ] || echo "1, GPU-1, fake"
"""
NO_REQUEUE = SICK.partition("[health]")[0].replace("[slurm]", "[slurm]\nrequeue = false")


@pytest.fixture(scope="module", autouse=True)
def submitted(cluster: Cluster, whole: Path) -> None:
    """All at once: those that take longest are on their way while others are looked at."""
    folder = cluster.folder
    cluster.submit("lost", *TWO, nodes=LOST)
    cluster.submit("preempted", "--devices", "2", nodes=PREEMPTED)
    cluster.submit("stopped", *TWO)
    cluster.submit("killed", *TWO)
    (folder / "fake").mkdir()
    (folder / "fake/nvidia-smi").write_text(FEWER_GPUS)
    (folder / "fake/nvidia-smi").chmod(0o755)
    (folder / "sick.toml").write_text(f"setup = ['export PATH=\"{folder}/fake:$PATH\"']\n{SICK}")
    cluster.submit("sick", "--site", str(folder / "sick.toml"))
    (folder / "chain.toml").write_text(NO_REQUEUE)
    cluster.submit("chain", "--site", str(folder / "chain.toml"), "--chain", "2")
    (folder / "sweep.txt").write_text("# seeds\n" + "".join(f"train.steps=3 train.seed={n}\n" for n in range(3)))
    cluster.submit("sweep", "--array", str(folder / "sweep.txt"))
    short = ("train.steps=2", "sample.num_steps=1", f"sample.prompts={PROMPTS}")
    cluster.submit("awkward", "--name", AWKWARD, *short, run_dir=AWKWARD)


@pytest.fixture(scope="module", autouse=True)
def disturbed(cluster: Cluster, submitted: None) -> Iterator[dict[str, Future[None]]]:
    """What happens to them, each in its own time."""
    with ThreadPoolExecutor() as pool:
        does = (usr1, kill_a_rank, kill_a_node, preempt, end_the_first)
        yield {action.__name__: pool.submit(action, cluster) for action in does}


def reached(cluster: Cluster, name: str, step: int) -> Path:
    run_dir = cluster.folder / name
    until(lambda: steps(run_dir) >= step, lambda: cluster.output(name))
    return run_dir


def usr1(cluster: Cluster) -> None:
    """What SLURM sends before the time limit, which it looks at twice a minute."""
    reached(cluster, "stopped", 3)
    cluster.ask("scancel", "--batch", "--signal=USR1", cluster.jobs["stopped"])


def kill_a_rank(cluster: Cluster) -> None:
    """It is looked up before there is a checkpoint, for there are but 28 short steps after it."""
    reached(cluster, "killed", 1)
    rank = cluster.ranks("killed")[1]
    reached(cluster, "killed", 12)
    os.kill(rank, signal.SIGKILL)


def kill_a_node(cluster: Cluster) -> None:
    """As if its power went; SLURM takes half a minute to notice."""
    reached(cluster, "lost", 1)
    node = cluster.nodes("lost")[1]
    reached(cluster, "lost", 12)
    cluster.slurm.kill_node(node)


def preempt(cluster: Cluster) -> None:
    """A job of a higher partition wants the node."""
    reached(cluster, "preempted", 3)
    (cluster.folder / "high.sh").write_text(f"#!/bin/bash\nsleep 1; date +%s >'{cluster.folder}/high'\n")
    cluster.ask(
        "sbatch", "--partition=high", "--exclusive", f"--nodelist={PREEMPTED[0]}", "--output=/dev/null",
        str(cluster.folder / "high.sh"),
    )  # fmt: skip


def end_the_first(cluster: Cluster) -> None:
    """Of two jobs in a chain."""
    reached(cluster, "chain", 3)
    cluster.ask("scancel", "--batch", "--signal=USR1", cluster.jobs["chain"].split()[0])


def test_usr1(cluster: Cluster, whole: Path, disturbed: dict[str, Future[None]]) -> None:
    run_dir = cluster.folder / "stopped"
    disturbed["usr1"].result()
    cluster.wait("stopped")
    assert "stopped and saved -> requeue" in cluster.output("stopped")
    assert cluster.field("stopped", "Restarts") == "1"
    told = json.loads((run_dir / "stopped.json").read_text())
    assert told == {"attempt": f"001/{cluster.jobs['stopped']}.1", "done": True, "step": STEPS, "signal": None}
    cluster.wait("whole")
    assert losses(run_dir) == losses(whole)


def test_two_nodes_train_as_one_process(cluster: Cluster, whole: Path) -> None:
    cluster.wait("whole")
    one = cluster.folder / "one"
    config = RunConfig.model_validate_json((whole / "config.json").read_text())
    changes = {"run_dir": str(one), "parallel": Parallel(), "launch": Launch()}
    assert run(config.model_copy(update=changes))
    expected, found = losses(one), losses(whole)
    assert [row[0] for row in found] == list(range(1, STEPS + 1))
    assert [(row[0], row[3]) for row in found] == [(row[0], row[3]) for row in expected]
    assert [row[1] for row in found] == pytest.approx([row[1] for row in expected], rel=1e-5)


def test_a_rank_is_killed(cluster: Cluster, whole: Path, disturbed: dict[str, Future[None]]) -> None:
    """The job starts again by itself, from the last checkpoint; srun names the rank."""
    run_dir = cluster.folder / "killed"
    disturbed["kill_a_rank"].result()
    cluster.wait("killed")
    assert cluster.field("killed", "Restarts") == "1"
    assert (run_dir / "jobs/001/failures").read_text().startswith("step-000000")
    assert "task 1: Killed" in cluster.output("killed")
    assert losses(run_dir) == losses(whole)


def test_a_node_that_fails_its_check_is_left_out(cluster: Cluster) -> None:
    cluster.wait("sick")
    (sick,) = (path.name for path in (cluster.folder / "sick/jobs/001/sick").rglob("127.*"))
    assert cluster.field("sick", "ExcNodeList").endswith(f",{sick}")
    assert f"health: {sick}: gpus failed: GPUs of the driver 1, at least 2" in cluster.output("sick")
    assert cluster.nodes("sick") == [node for node in ANYWHERE if node != sick]
    assert steps(cluster.folder / "sick") == STEPS


def test_a_chain_goes_on_where_a_job_ended(cluster: Cluster, disturbed: dict[str, Future[None]]) -> None:
    """On a site that requeues nothing: two jobs with two ids, one run."""
    run_dir = cluster.folder / "chain"
    disturbed["end_the_first"].result()
    second = cluster.jobs["chain"].split()[1]
    cluster.wait("chain", job=second)
    assert steps(run_dir) == STEPS
    assert "stopped and saved" in cluster.output("chain")
    assert json.loads((run_dir / "stopped.json").read_text())["attempt"] == f"001/{second}.0"


def test_an_array(cluster: Cluster) -> None:
    runs = [cluster.folder / "sweep" / str(number) for number in range(3)]
    until(lambda: all((path / "stopped.json").is_file() for path in runs), lambda: cluster.output("sweep"))
    until(lambda: cluster.status("sweep").count(" done (completed") == 3, lambda: cluster.status("sweep"))
    assert [steps(path) for path in runs] == [3, 3, 3]
    assert len({str(losses(path)) for path in runs}) == 3, "each with its own seed"


def test_awkward_words_do_no_harm(cluster: Cluster) -> None:
    """In paths, in the name of the job and in overrides; a line break in an override too."""
    run_dir = cluster.folder / AWKWARD
    cluster.wait("awkward")
    assert steps(run_dir) == 2
    assert json.loads((run_dir / "config.json").read_text())["sample"]["prompts"] == json.loads(PROMPTS)
    assert not [path for path in (*Path.cwd().glob("*"), *cluster.folder.rglob("*")) if path.name == "pwned"]
    assert AWKWARD in cluster.ask("squeue", "-h", "-t", "all", "-j", cluster.jobs["awkward"], "-o", "%j")


def test_one_process_on_every_node(cluster: Cluster) -> None:
    """It starts two ranks; a signal reaches all, and is no failure."""
    wide = ("--devices", "2", "--ranks", "node", "train.global_batch=8", "train.steps=20000")
    run_dir = cluster.submit("by-node", *TWO, *wide)
    reached(cluster, "by-node", 2)
    assert "by-node" in cluster.vidit("status", run_dir)
    assert cluster.vidit("cancel", run_dir) == f"asked {cluster.jobs['by-node']} to save and leave\n"
    cluster.wait("by-node", "CANCELLED")
    told = json.loads((run_dir / "stopped.json").read_text())
    assert not told["done"]
    assert told["step"] == steps(run_dir)
    assert (run_dir / f"checkpoints/step-{told['step']:08d}/manifest.json").is_file()
    assert cluster.field("by-node", "Restarts") == "0"


def test_status_and_logs(cluster: Cluster, whole: Path) -> None:
    cluster.wait("whole")
    text = cluster.status("whole")
    assert text.startswith(f"slurm {cluster.jobs['whole']} done (completed, nodes 127.0.0.[11-12], ")
    assert f"{whole}: done at step {STEPS}, start 001/{cluster.jobs['whole']}.0" in text
    out = cluster.vidit("logs", whole, "--lines", 1)
    assert out.endswith(": done\n")
    assert out.count("\n") == 1
    again = cluster.vidit("cancel", whole)
    assert again == f"nothing to cancel: {cluster.jobs['whole']} is done\n"


def test_the_preempted_job_went_on(cluster: Cluster, whole: Path, disturbed: dict[str, Future[None]]) -> None:
    """It has saved, given way and gone on."""
    disturbed["preempt"].result()
    until(lambda: (cluster.folder / "high").is_file(), lambda: cluster.output("preempted"))
    cluster.wait("preempted")
    assert "stopped and saved -> requeue" in cluster.output("preempted")
    assert cluster.field("preempted", "Restarts") == "1"
    assert losses(cluster.folder / "preempted") == losses(whole)


def test_the_lost_node_was_replaced(cluster: Cluster, whole: Path, disturbed: dict[str, Future[None]]) -> None:
    disturbed["kill_a_node"].result()
    cluster.wait("lost")
    assert int(cluster.field("lost", "Restarts")) >= 1
    assert losses(cluster.folder / "lost") == losses(whole)
