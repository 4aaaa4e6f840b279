"""The files for clusters: what Ray and Kubernetes would read, checked with what of them is installed."""

from __future__ import annotations

import json
import shlex
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from launch.ray_backend import Backend
from launch.site import read_site
from tests.unit.launch.test_ray import job, order_of

ray = pytest.importorskip("ray")
yaml = pytest.importorskip("yaml")
jsonschema = pytest.importorskip("jsonschema")

FILES = Path(__file__).parents[3] / "cluster" / "ray"


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return dict(yaml.safe_load((FILES / "cluster.yaml").read_text()))


@pytest.fixture(scope="module")
def kube() -> dict[str, Any]:
    return dict(yaml.safe_load((FILES / "kuberay.yaml").read_text()))


def started(command: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Variables and options of a line `A=b .../ray start --x`, parsed by Ray's own command."""
    from ray.scripts.scripts import start

    words = shlex.split(command)
    number = next(n for n, word in enumerate(words) if word.rpartition("/")[2] == "ray")
    assert words[number + 1] == "start"
    return dict(word.split("=", 1) for word in words[:number]), start.make_context("start", words[number + 2 :]).params


class TestLauncher:
    def test_ray_knows_every_key(self, cluster):
        schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
        top = set(cluster) - {"min_workers"}  # of provider local, and not in the schema
        assert top <= set(schema["properties"])
        jsonschema.validate({key: cluster[key] for key in top}, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**{key: cluster[key] for key in top}, "max_workers": "two"}, schema)

    def test_it_is_what_ray_makes_of_it(self, cluster):
        """Ray fills in node types for machines that are there: one for all, with as many workers as addresses."""
        from ray.autoscaler._private.local.config import prepare_local

        made, _ = prepare_local(dict(cluster))
        (kind,) = made["available_node_types"].values()
        assert kind["max_workers"] == len(cluster["provider"]["worker_ips"])

    def test_the_head_has_a_token_and_no_ranks_and_stays_on_localhost(self, cluster):
        variables, options = started(cluster["head_start_ray_commands"][-1])
        assert variables["RAY_AUTH_MODE"] == "token"
        assert (options["num_cpus"], options["num_gpus"], options["dashboard_host"]) == (0, 0, "127.0.0.1")
        assert "~/.ray/auth_token" in cluster["file_mounts"]

    def test_workers_find_the_head(self, cluster):
        variables, options = started(cluster["worker_start_ray_commands"][-1])
        _, head = started(cluster["head_start_ray_commands"][-1])
        assert variables["RAY_AUTH_MODE"] == "token"
        assert options["address"] == f"$RAY_HEAD_IP:{head['port']}"

    def test_bash_reads_every_command(self, cluster):
        for part in ("head", "worker"):
            for command in cluster[f"{part}_start_ray_commands"]:
                assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0


class TestKube:
    def test_kind_version_and_token(self, kube):
        assert (kube["apiVersion"], kube["kind"]) == ("ray.io/v1", "RayCluster")
        assert kube["spec"]["rayVersion"] == version("ray")
        assert kube["spec"]["authOptions"] == {"mode": "token"}
        assert kube["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"

    def test_a_pod_has_what_a_node_of_its_site_is_asked_for(self, kube):
        site = read_site("kuberay_h100")
        assert list(Backend().faults(job(devices=8, site="kuberay_h100"), site)) == []
        bundle = order_of(job(devices=site.devices, site="kuberay_h100"), site).bundle
        for group in kube["spec"]["workerGroupSpecs"]:
            (container,) = group["template"]["spec"]["containers"]
            limits = container["resources"]["limits"]
            assert limits == container["resources"]["requests"], "Ray counts limits, Kubernetes places by requests"
            assert float(limits["cpu"]) >= bundle["CPU"]
            assert float(limits["nvidia.com/gpu"]) == bundle["GPU"]

    def test_volumes_that_are_mounted_are_there(self, kube):
        spec = kube["spec"]
        for pod in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            inner = pod["template"]["spec"]
            there = {volume["name"] for volume in inner["volumes"]}
            for container in inner["containers"]:
                assert {mount["name"] for mount in container["volumeMounts"]} == there

    def test_ranks_have_time_to_save_when_a_pod_is_evicted(self, kube):
        for group in kube["spec"]["workerGroupSpecs"]:
            inner = group["template"]["spec"]
            assert inner["terminationGracePeriodSeconds"] > read_site("kuberay_h100").ray.grace_s
            (shell, option, line) = inner["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
            assert (shell, option) == ("bash", "-c")
            assert subprocess.run(["bash", "-n", "-c", line]).returncode == 0
            command = " ".join(order_of(job(), read_site("kuberay_h100")).command)
            pattern = shlex.split(line)[3].rstrip(";")
            found = subprocess.run(["grep", "-Ec", pattern], input=command, text=True, capture_output=True)
            assert found.stdout == "1\n", "pkill -f finds ranks by this pattern"
