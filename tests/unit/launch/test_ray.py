"""Ray without Ray: what the driver is told and decides, what a back-end refuses, ranks that an actor would start."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.folder import SCRIPT
from launch.job import JobSpec, Task
from launch.ray_backend import ADDRESSES, Backend
from launch.ray_nodes import config_of, node_counts, refusal
from launch.ray_order import Order, parse
from launch.site import Ray, Site
from vidit.config import ConfigError, RunConfig


def job(**changes: object) -> JobSpec:
    told = {
        "name": "a run", "config": "configs.demo", "tasks": (Task(run_dir="/runs/it's a"),), "nodes": 4, "devices": 8,
        "workdir": "/home/me", "python": "/venv/bin/python", "address": "http://head:8265",
    }  # fmt: skip
    return JobSpec.model_validate({**told, **changes})


class TestOrder:
    def test_what_is_written_is_read(self):
        order = Order(
            folder=Path("/r u/jobs/001"), task=3, run_dir=Path("/r u"), nodes=4, min_nodes=2, devices=8, device="GPU",
            cpus_per_device=6, restarts=1, wait_s=60.0, settle_s=5.0, grace_s=120.0, exports=("A", "B_C"),
            command=("python", "-m", "x", "--nodes=9", "a b", "$(c)"),
        )  # fmt: skip
        words = order.words()
        assert words[:2] == ["-m", "launch.ray_driver"]
        assert parse(words[2:]) == order
        assert order.bundle == {"CPU": 48.0, "GPU": 8.0}

    def test_devices_that_are_cpus_are_counted_once(self):
        assert order_of(job(devices=2), Site(ray=Ray(device="CPU", cpus_per_device=3))).bundle == {"CPU": 6.0}

    def test_what_is_missing_is_named(self, capsys):
        with pytest.raises(SystemExit):
            parse(["--nodes=2", "--", "true"])
        assert "--min-nodes" in capsys.readouterr().err


def order_of(spec: JobSpec, site: Site, number: int = 0) -> Order:
    """The order that bash gives the driver when it runs the script, read from what takes the place of Python."""
    script = Backend().render(spec, site, Path("/runs/it's a/jobs/001"))
    shown = script.replace("cd -- /home/me", "cd -- /").replace("exec /venv/bin/python", "exec printf '%s\\0'")
    done = subprocess.run(["bash", "-c", shown, "job.sh", str(number)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return parse(done.stdout.split("\0")[2:-1])


class TestScript:
    def test_bash_gives_the_driver_what_was_asked_for(self):
        site = Site(environment={"NCCL_IB_HCA": "mlx5; $(id)"}, ray=Ray(wait_s=7))
        order = order_of(job(min_nodes=2), site)
        assert (order.nodes, order.min_nodes, order.devices, order.wait_s) == (4, 2, 8, 7.0)
        assert str(order.run_dir) == "/runs/it's a"
        assert order.command[0] == "/venv/bin/python"
        assert order.command[-1] == "launch.local=1"
        assert "NCCL_IB_HCA" in order.exports
        assert "export NCCL_IB_HCA='mlx5; $(id)'\n" in Backend().render(job(), site, Path("/x"))

    def test_without_fewer_nodes_all_are_needed(self):
        assert order_of(job(), Site()).min_nodes == 4

    def test_each_run_of_a_sweep_has_its_own(self):
        tasks = tuple(Task(run_dir=f"/runs/{n}", overrides=(f"train.seed={n}",)) for n in range(3))
        order = order_of(job(tasks=tasks), Site(), 2)
        assert str(order.run_dir) == "/runs/2"
        assert "train.seed=2" in order.command
        assert order.output.name == "output-2.log"

    def test_a_run_that_is_not_there(self):
        done = subprocess.run(
            ["bash", "-c", Backend().render(job(workdir="/"), Site(), Path("/x")), "job.sh", "5"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2
        assert "no run 5" in done.stderr

    def test_the_command_is_a_line_that_a_person_can_type(self):
        argv = Backend().argv(job(), Path("/x") / SCRIPT)
        assert shlex.join(argv).startswith("ray job submit --address=http://head:8265 --no-wait ")
        assert argv[-4:] == ["--", "bash", "/x/job.sh", "0"]
        patience = next(json.loads(word.partition("=")[2]) for word in argv if word.startswith("--runtime-env"))
        assert int(patience["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) > Ray().grace_s


class TestFaults:
    @pytest.fixture(autouse=True)
    def no_cluster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ADDRESSES:
            monkeypatch.delenv(name, raising=False)

    def test_none(self):
        assert list(Backend().faults(job(min_nodes=3), Site(ray=Ray(address="http://head:8265")))) == []

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"address": ""}, "no address"),
            ({"min_nodes": 4}, "--min-nodes=4 has no effect with --nodes=4"),
            ({"minutes": 5}, "--time has no effect"),
            ({"after": ("1",)}, "--after has no effect"),
            ({"chain": 2}, "--chain has no effect"),
            ({"options": ("--x",)}, "--sbatch has no effect"),
            ({"ranks": "node"}, "--ranks has no effect"),
            ({"workdir": "/a:b"}, "PYTHONPATH"),
        ],
    )
    def test_of_a_job(self, changes, told):
        (fault,) = Backend().faults(job(**changes), Site())
        assert told in fault

    def test_of_a_site(self):
        site = Site(devices=4, modules=("cuda",), setup=("true",))
        found = list(Backend().faults(job(), site))
        assert len(found) == 3
        assert "has 4; use at most" in found[0]

    def test_the_address_of_an_option_counts_most(self, monkeypatch):
        script, site = Path("/x/job.sh"), "ray_local"
        monkeypatch.setenv(ADDRESSES[1], "10.0.0.1:6379")
        assert "--address=10.0.0.1:6379" in Backend().argv(job(address="", site=site), script)
        monkeypatch.setenv(ADDRESSES[0], "http://env:1")
        assert "--address=http://env:1" in Backend().argv(job(address="", site=site), script)
        assert "--address=http://head:8265" in Backend().argv(job(site=site), script)


class TestDecisions:
    def test_numbers_of_nodes_that_divide_the_batch(self, configure: Callable[..., RunConfig]):
        config = configure("", train={"global_batch": 12, "micro_batch": 1})
        assert node_counts(config, 6, 1, 1) == [6, 4, 3, 2, 1]
        with pytest.raises(ConfigError, match=r"--min-nodes=5 x 1 devices: .*not divisible"):
            node_counts(config, 6, 5, 1)
        with pytest.raises(ConfigError, match="--nodes=5 x 1 devices"):
            node_counts(config, 5, 1, 1)

    def test_a_layout_of_fixed_size_has_one_number(self, configure: Callable[..., RunConfig]):
        config = configure("", parallel={"shard": 2})
        assert node_counts(config, 2, 2, 1) == [2]
        with pytest.raises(ConfigError, match=r"--min-nodes=1 x 1 devices: the layout shard 2 takes 2 ranks"):
            node_counts(config, 2, 1, 1)

    def test_the_config_is_that_of_the_command(self):
        config = config_of(("python", "-m", "vidit.cli", "train", "configs.demo", "train.steps=7", "launch.local=1"))
        assert config.train.steps == 7

    def test_refusals_give_both_numbers(self):
        nodes = [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 4.0, "GPU": 2.0}, {"CPU": 8.0}]
        told = refusal(2, {"CPU": 8.0, "GPU": 8.0}, nodes, 60)
        assert "2 nodes with CPU=8 GPU=8 each are wanted, but 0 of the cluster's 3 nodes" in told
        assert "(2 with CPU=4 GPU=2; 1 with CPU=8 GPU=0)" in told
        busy = refusal(2, {"CPU": 4.0, "GPU": 2.0}, nodes, 60)
        assert "2 such nodes are there but have not become free in 60 s" in busy


def test_the_back_end_needs_no_ray_to_render(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom launch.backend import load_backend\nload_backend('ray')\nimport launch.ray_driver\n"
        "assert not {'ray', 'torch'} & set(sys.modules)"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
