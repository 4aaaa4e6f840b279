"""Checks of a node's health: what nvidia-smi may say, what hangs, and nodes that meet, as processes of this machine."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.health.__main__ import CHECKS
from cluster.health.asked import Asked, Place, find_place
from cluster.health.disk import disk
from cluster.health.finding import Finding, UnfitError
from cluster.health.guard import run_check
from cluster.health.nodes import pairings

ROOT = Path(__file__).parents[3]
GPUS = "0, GPU-aaaa, NVIDIA H100 80GB HBM3\n1, GPU-bbbb, NVIDIA H100 80GB HBM3\n"
ECC = "0, Enabled, 0\n1, Enabled, 0\n"
ROWS = "00000000:1B:00.0, 0, No, No\n00000000:43:00.0, 1, 0, 0\n"
CLOCKS = "0, 1980, 1980, Not Active, Not Active, Not Active, Not Active\n1, 345, 1980, 0, 0, 0, [N/A]\n"
Smi = Callable[..., dict[str, Any]]


def health(*words: str, **environment: str) -> "subprocess.Popen[str]":
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.health", *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**inherited, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Smi:
    """A check, with an nvidia-smi that says this."""

    def check(name: str, text: str, code: int = 0, gpus: int = 2) -> dict[str, Any]:
        (tmp_path / "said").write_text(text)
        (tmp_path / "nvidia-smi").write_text(
            f'#!/bin/sh\necho "$*" >>{tmp_path}/asked\ncat {tmp_path}/said\nexit {code}\n'
        )
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return run_check(CHECKS[name].run, Asked(gpus=gpus), 20)

    return check


@pytest.mark.parametrize(("name", "text"), [("gpus", GPUS), ("ecc", ECC), ("rows", ROWS), ("clocks", CLOCKS)])
def test_a_sound_node(smi: Smi, name: str, text: str, tmp_path: Path) -> None:
    told = smi(name, text)
    assert told["verdict"] == "pass", told
    assert len(told["findings"]) >= 2
    assert "--format=csv,noheader,nounits" in (tmp_path / "asked").read_text()


@pytest.mark.parametrize(
    ("name", "text", "because"),
    [
        ("gpus", GPUS.splitlines()[0], "GPUs of the driver 1, at least 2; look at dmesg"),
        ("gpus", "", "GPUs of the driver 0, at least 2"),
        ("gpus", GPUS.replace("GPU-bbbb", "[GPU is lost]"), "gpu 1 says 'GPU is lost'"),
        ("gpus", "Unable to determine the device handle for GPU0000:43:00.0", "1 cells for 3 fields"),
        (
            "ecc",
            ECC.replace("1, Enabled, 0", "1, Enabled, 3"),
            "gpu 1 ecc.errors.uncorrected.volatile.total 3, at most 0",
        ),
        ("ecc", ECC.replace("0, Enabled", "0, Disabled"), "gpu 0 ECC 0, must be 1"),
        ("ecc", ECC.replace("1, Enabled, 0", "1, Enabled, [Unknown Error]"), "is 'Unknown Error', must be a number"),
        ("rows", ROWS.replace("No, No", "Yes, No"), "gpu 00000000:1B:00.0 remapped_rows.pending 1, at most 0; reset"),
        ("rows", ROWS.replace("1, 0, 0", "1, 0, 1"), "remapped_rows.failure 1, at most 0; have the GPU replaced"),
        ("clocks", CLOCKS.replace("1980, Not Active, Not", "1980, Not Active, "), "hw_thermal_slowdown 1, must be 0"),
    ],
)
def test_an_unfit_node(smi: Smi, name: str, text: str, because: str) -> None:
    told = smi(name, text)
    assert told["verdict"] == "fail"
    assert because in told["because"]


def test_what_a_device_lacks_is_no_fault(smi: Smi) -> None:
    assert smi("ecc", "0, [N/A], [N/A]\n")["verdict"] == "pass"


def test_nvidia_smi_fails(smi: Smi) -> None:
    told = smi("gpus", "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", code=9)
    assert told["because"].startswith("nvidia-smi ends with code 9: NVIDIA-SMI has failed")


def forever(asked: Asked) -> Iterator[Finding]:
    subprocess.run(["sleep", "77.125"])
    yield Finding("", 0, "", "")


def crash(asked: Asked) -> Iterator[Finding]:
    os.kill(os.getpid(), signal.SIGKILL)
    yield Finding("", 0, "", "")


def test_a_check_that_hangs_is_ended_with_what_it_started() -> None:
    start = time.monotonic()
    told = run_check(forever, Asked(), 0.5)
    assert time.monotonic() - start < 60
    assert re.match(r"no answer in \S+ s, at most 0\.5;", told["because"]), told
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if b"77.125" in _read(p)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_check_that_crashes() -> None:
    assert "ended with code -9 and no answer" in run_check(crash, Asked(), 10)["because"]


def test_disk(tmp_path: Path) -> None:
    found = list(disk(Asked(folders=(tmp_path,), free_gib=0, disk_mib_s=0)))
    assert [one.is_fit for one in found] == [True] * 4
    assert list(tmp_path.iterdir()) == []
    assert not all(one.is_fit for one in disk(Asked(folders=(tmp_path,), free_gib=1e9)))
    with pytest.raises(UnfitError, match="does not exist"):
        list(disk(Asked(folders=(tmp_path / "none",))))


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("--check", "limits", "--folder", "/tmp"), "--folder has no effect on limits"),
        (("--check", "ecc"), "--check ecc looks at GPUs"),
        (("--gpus", "-1"), "--gpus=-1 is too small"),
        (("--hardware", "h1000"), "no hardware 'h1000'"),
    ],
)
def test_usage(words: tuple[str, ...], fault: str) -> None:
    process = health(*words)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert fault in errors


def test_places() -> None:
    meeting = {"MASTER_ADDR": "a", "MASTER_PORT": "1", "SLURMD_NODENAME": "n"}
    assert find_place({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", **meeting}) == Place(1, 2, "a", 1, "n")
    assert find_place({"RANK": "0", "WORLD_SIZE": "1"}).nodes == 1
    with pytest.raises(ValueError, match="MASTER_ADDR MASTER_PORT not set"):
        find_place({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_pairs_meet_both_neighbours(count: int) -> None:
    met: dict[int, set[int]] = {number: set() for number in range(count)}
    for pairs in pairings(list(range(count))):
        assert len({node for pair in pairs for node in pair}) == sum(map(len, pairs))
        for one, other in pairs:
            met[one].add(other)
            met[other].add(one)
    assert all(met[n] == {(n - 1) % count, (n + 1) % count} for n in met)


def test_nodes_meet_and_the_one_at_fault_fails(tmp_path: Path) -> None:
    """Three nodes, one of which cannot take part in the sum: found by pairs, and it alone fails."""
    with socket.socket() as one:
        one.bind(("", 0))
        port = one.getsockname()[1]
    meeting = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    words = ("--json", "--check", "nodes", "--limit-s", "8")
    nodes = [
        health(*words, **{**meeting, "RANK": str(n), "GLOO_SOCKET_IFNAME": "lo" if n != 1 else "none0"})
        for n in range(3)
    ]
    told = [node.communicate(timeout=200) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 1, 0], told
    assert "nodes failed: all-reduce failed with all 3 nodes and with each neighbour" in told[1][1]
    first = json.loads(told[0][0])
    assert first["checks"]["nodes"]["verdict"] == "pass"
    assert "not over all" in str(first["checks"]["nodes"]["findings"])


OFF = """
import sys, time
from cluster.health.asked import Asked, Place
from cluster.health.nodes import nodes

number, port, off_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
asked = Asked(Place(number, 3, "127.0.0.1", port, str(number)), is_fit=False)  # unfit: no sum, clocks only
for found in nodes(asked, lambda: time.time() + off_s):
    if found.what.startswith("clock"):
        print(found.is_fit, found)
"""


def test_the_node_whose_clock_is_off_is_named() -> None:
    with socket.socket() as one:
        one.bind(("", 0))
        port = one.getsockname()[1]
    running = [
        subprocess.Popen([sys.executable, "-c", OFF, str(n), str(port), str(off)], cwd=ROOT, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for n, off in enumerate((0, -30, 0))
    ]  # fmt: skip
    told = [process.communicate(timeout=120) for process in running]
    fit = [out.split(" ")[0] for out, _ in told]
    assert fit == ["True", "False", "True"], told
    assert told[1][0].startswith("False clock off by s 30"), told
