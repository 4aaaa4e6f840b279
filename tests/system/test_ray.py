"""The real `vidit train` on a real Ray of several nodes on this machine: submitted, killed in parts, cancelled."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.processes import end
from cluster.ray import daemons, processes
from cluster.ray.local import LocalRay, missing, start, up
from cluster.ray.processes import marked
from launch.restart import newest_step
from vidit.config import RunConfig
from vidit.train.metrics import read_metrics
from vidit.train.run import run

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

ROOT = Path(__file__).parents[2]
WAIT_S = 120.0
SITE = """
[ray]
device = "CPU"
cpus_per_device = {cpus}
wait_s = {wait}
settle_s = 4
grace_s = 60

[environment]
OMP_NUM_THREADS = "1"
CUDA_VISIBLE_DEVICES = ""
TORCH_CPP_LOG_LEVEL = "ERROR"
"""
Vidit = Callable[..., subprocess.CompletedProcess[str]]
STEPS = 40
ENDLESS = "train.steps=100000"  # where the run is stopped, whenever that gets through


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[LocalRay]:
    with LocalRay(daemons.Shape(nodes=2, cpus=2)) as ray:
        yield ray


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ray") / "site.toml"
    path.write_text(SITE.format(wait=60, cpus=1))
    return path


@pytest.fixture(scope="session")
def config(configure: Callable[..., RunConfig]) -> RunConfig:
    """Of all runs here: long enough to be killed in its middle."""
    train = {"steps": STEPS, "checkpoint_every": 5, "validate_every": STEPS, "async_checkpoint": False}
    return configure("", train=train, sample={"prompts": ()})


@pytest.fixture(scope="session")
def name(
    config: RunConfig, config_file: Callable[[Path, RunConfig], str], tmp_path_factory: pytest.TempPathFactory
) -> str:
    return config_file(tmp_path_factory.mktemp("ray"), config)


@pytest.fixture(scope="session")
def alone(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """The metrics of the run in this process."""
    run_dir = tmp_path_factory.mktemp("ray") / "alone"
    assert run(config.model_copy(update={"run_dir": str(run_dir)}))
    return list(read_metrics(run_dir))


class Job:
    """A run that is submitted to the cluster."""

    def __init__(self, vidit: Vidit, ray: LocalRay, run_dir: Path):
        self.vidit, self.ray, self.run_dir = vidit, ray, run_dir
        self.is_over = True

    def __call__(self, *words: object) -> str:
        done = self.vidit(*words, extra=self.ray.environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, name: str, site: Path, *options: str) -> None:
        """`options` may hold overrides."""
        told = self("submit", "ray", "--site", site, name, f"run_dir={self.run_dir}", *options)
        assert told.startswith("submitted ")
        self.is_over = False

    def reach(self, step: int) -> None:
        """Wait for a checkpoint of that step or a later one."""
        wait(lambda: newest_step(self.run_dir / "checkpoints") >= step, poll_s=0.05)

    def end(self) -> str:
        """The output, when the job is over."""
        output = self("logs", "--follow", self.run_dir)
        self.is_over = True
        return output

    def status(self) -> str:
        return self("status", self.run_dir).splitlines()[0]

    def left(self) -> list[str]:
        """Command lines of what still runs for it."""
        every = [(p.info["pid"], " ".join(p.info["cmdline"] or [])) for p in psutil.process_iter(["pid", "cmdline"])]
        return [
            line for pid, line in every if pid != os.getpid() and (str(self.run_dir) in line or "ray::Node" in line)
        ]


def wait(condition: Callable[[], bool], poll_s: float = 0.1) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(poll_s)


@pytest.fixture
def job(vidit: Vidit, ray_cluster: LocalRay, tmp_path: Path) -> Iterator[Job]:
    one = Job(vidit, ray_cluster, tmp_path / "run")
    yield one
    if not one.is_over:
        vidit("cancel", one.run_dir, extra=ray_cluster.environment)


def same(run_dir: Path, alone: list[dict[str, object]]) -> None:
    """The metrics of a run are those of one process, bit for bit but for sums over ranks."""
    found = list(read_metrics(run_dir))
    assert [row["step"] for row in found] == [row["step"] for row in alone]
    for mine, theirs in zip(found, alone, strict=True):
        assert mine.get("keys") == theirs.get("keys")
        numbers = {k: v for k, v in theirs.items() if isinstance(v, float)}
        assert {k: mine[k] for k in numbers} == pytest.approx(numbers, rel=1e-4)


def test_two_nodes_train_as_one_process(job: Job, name: str, site: Path, alone: list[dict[str, object]]) -> None:
    job.submit(name, site, "--nodes=2")
    output = job.end()
    assert "start 1" in output
    assert "2 ranks on 127.0.0.1" in output
    status = job.status()
    assert " done (succeeded" in status, output
    assert status.endswith("is done)")
    same(job.run_dir, alone)
    wait(lambda: not job.left())


def test_an_actor_is_killed_and_the_job_cancelled(job: Job, name: str, site: Path) -> None:
    """The ranks of the actor save and leave, for they see that it is gone; all are started again, until cancelled."""
    job.submit(name, site, "--nodes=2", ENDLESS)
    job.reach(5)
    actor = next(p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [""])[0].startswith("ray::NodeR"))
    actor.kill()
    wait(lambda: "resumed" in (job.run_dir / "jobs/001/output-0.log").read_text())
    job("cancel", job.run_dir)
    output = job.end()
    assert "or its actor is gone" in output
    assert "start 2" in output
    assert f"resumed {job.run_dir} at step" in output
    assert "ray: stopped by SIGTERM" in output
    assert " cancelled (" in job.status()
    facts = json.loads((job.run_dir / "stopped.json").read_text())
    assert facts["done"] is False
    assert newest_step(job.run_dir / "checkpoints") == facts["step"] >= 5
    wait(lambda: not job.left())


def test_a_node_is_lost_and_the_other_goes_on(
    job: Job, name: str, site: Path, alone: list[dict[str, object]], ray_cluster: LocalRay
) -> None:
    job.submit(name, site, "--nodes=2", "--min-nodes=1")
    job.reach(10)
    lost = ray_cluster.shape.names[1]
    ray_cluster.kill_node(lost)
    try:
        output = job.end()
    finally:
        ray_cluster.revive()
    assert "1 ranks on 127.0.0.12" in output
    assert f"resumed {job.run_dir} at step" in output
    assert job.status().endswith("is done)"), output
    same(job.run_dir, alone)


def test_ranks_of_a_killed_driver_save_and_leave(job: Job, name: str, site: Path) -> None:
    job.submit(name, site, "--nodes=2", "--min-nodes=1", ENDLESS)
    job.reach(5)
    driver = next(p for p in psutil.process_iter(["cmdline"]) if "launch.ray_driver" in (p.info["cmdline"] or []))
    driver.send_signal(signal.SIGKILL)
    wait(lambda: not job.left())
    wait(lambda: " failed" in job.status(), poll_s=0.5)
    assert json.loads((job.run_dir / "stopped.json").read_text())["signal"] == "SIGTERM"


def test_the_head_is_lost(vidit: Vidit, ray_cluster: LocalRay, name: str, site: Path, tmp_path: Path) -> None:
    """The ranks train on until Ray ends them, save and leave; under another Ray the run goes on, once somebody says
    that the job is over."""
    with LocalRay(daemons.Shape(nodes=2, cpus=2)) as first:
        job = Job(vidit, first, tmp_path / "run")
        job.submit(name, site, "--nodes=2", ENDLESS)
        job.reach(5)
        first.kill_node(daemons.HEAD)
        wait(lambda: not job.left())
        submit = ("submit", "ray", "--site", site, name, f"run_dir={job.run_dir}", "--nodes=2")
        refused = vidit(*submit, extra=first.environment)
        assert refused.returncode == 1
        assert "cannot be asked (" in refused.stderr
        record = job.run_dir / "jobs/001/job.json"
        assert refused.stderr.rstrip().endswith(f"if it is, remove {record}")
    facts = json.loads((job.run_dir / "stopped.json").read_text())
    assert newest_step(job.run_dir / "checkpoints") == facts["step"] > 5
    record.unlink()
    again = Job(vidit, ray_cluster, job.run_dir)
    again.submit(name, site, "--nodes=2", f"train.steps={facts['step'] + 3}")
    assert f"resumed {job.run_dir} at step {facts['step']}" in again.end()
    assert again.status().endswith("is done)")


def test_a_run_that_cannot_start_is_given_up(job: Job, name: str, site: Path) -> None:
    job.submit(name, site, "--nodes=2", "--restarts=3", "data.train=/nowhere")
    output = job.end()
    assert "/nowhere is not a folder" in output
    assert "it would fail again" in output
    assert "start 2" not in output
    status = job.status()
    assert "/nowhere" in status
    assert " failed (" in status
    wait(lambda: not job.left())


def test_more_than_the_cluster_has_is_refused(job: Job, name: str, tmp_path: Path) -> None:
    large = tmp_path / "large.toml"
    large.write_text(SITE.format(wait=2, cpus=64))
    job.submit(name, large, "--nodes=2")
    output = job.end()
    assert "waiting for nodes: 0 of 2 are there" in output
    assert "2 nodes with CPU=64 each are wanted, but 0 of the cluster's 3 nodes are that large" in output
    assert "(2 with CPU=2; 1 with CPU=0)" in output
    assert " failed (" in job.status()
    assert not job.left()


def test_without_the_token_nobody_gets_in(ray_cluster: LocalRay) -> None:
    address = ray_cluster.environment["RAY_API_SERVER_ADDRESS"]
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{address}/api/jobs/", timeout=10)
    assert (ray_cluster.root / "token").stat().st_mode & 0o77 == 0


def belongs(root: Path) -> list[int]:
    return [process for process, mark in marked() if mark.root == root]


@pytest.mark.parametrize("who", ["owner", "keeper"])
def test_nothing_is_left_of_a_ray_whose_owner_or_keeper_is_gone(who: str) -> None:
    root = Path("/tmp") / f"ray-own-{os.getpid()}"
    root.mkdir(mode=0o700)
    keeper = start(root, daemons.Shape(nodes=0), owned=True)
    try:
        assert len(belongs(root)) > 3
        if who == "owner":
            assert keeper.stdin
            keeper.stdin.close()  # as the kernel does, however the owner ends
            keeper.wait()
        else:
            keeper.kill()  # what it leaves is for the next one
            keeper.wait()
            assert set(belongs(root)) <= set(processes.orphans())
            end(processes.orphans)
        assert belongs(root) == []
    finally:
        end(lambda: belongs(root))
        shutil.rmtree(root)


def test_paths_that_ray_cannot_take(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="characters, and at most 40"):
        start(tmp_path / ("long" * 10), daemons.Shape(), owned=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        up(tmp_path / "full", daemons.Shape())
