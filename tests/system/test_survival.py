"""Runs that lose ranks or the network: what happens, from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.chaos import measure
from parallel.failure import read_report

ROOT = Path(__file__).parents[2]
CUT_TIMEOUT_S = 4.0


def test_ranks_are_killed_while_they_save(tmp_path: Path) -> None:
    """Every step is saved, beside the training, so that each kill falls into saves; the run ends as if undisturbed."""
    found = measure(tmp_path, num_kills=2, steps=34, seed=1, checkpoint_every=1)
    assert found["equal"]
    assert found["steps"] == 34
    assert (found["disturbed"]["starts"], found["disturbed"]["failures"]) == (3, 2)
    assert found["disturbed"]["lost_steps"] <= 2 * 2, "at most the save in flight and the one before it, each time"
    assert 0 < found["goodput"]["disturbed"] < found["goodput"]["undisturbed"] < 1


RANK = """
import sys
sys.path[:0] = [{root!r}, {dist!r}]
import failing_loop
from launch.rank import own_place, rank_process
from pathlib import Path

with rank_process(own_place(), Path({folder!r})):
    failing_loop.train(Path({folder!r}), "", timeout_s={timeout}, last=100000)
"""


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them, 10.91.7.1 and 10.91.7.2."""
    names = [f"vidit-{os.getpid()}-{n}" for n in (1, 2)]
    ends = [f"v{os.getpid()}-{n}" for n in (1, 2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            ip("-n", name, "addr", "add", f"10.91.7.{number}/24", "dev", end)
            for device in ("lo", end):
                ip("-n", name, "link", "set", device, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        pytest.skip(f"no network namespaces can be made here: {error}")
    yield names
    for name in names:
        ip("netns", "del", name)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def wait_for_steps(folder: Path) -> None:
    deadline = time.monotonic() + 90
    while not (folder / "begun").exists():
        assert time.monotonic() < deadline, (folder / "0.err").read_text()
        time.sleep(0.1)


def test_the_network_is_cut(hosts: list[str], tmp_path: Path) -> None:
    """Both ends leave within the timeout; the one with the store says which rank was not heard of any more."""
    code = RANK.format(root=str(ROOT), dist=str(ROOT / "tests/dist"), folder=str(tmp_path), timeout=CUT_TIMEOUT_S)
    ranks = []
    for rank, name in enumerate(hosts):
        environment = {
            **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "10.91.7.1", "MASTER_PORT": "29511", "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": f"v{os.getpid()}-{rank + 1}",
            "TORCHELASTIC_ERROR_FILE": str(tmp_path / f"{rank}.json"),
        }  # fmt: skip
        with (tmp_path / f"{rank}.err").open("w") as err:
            ranks.append(subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, "-c", code], env=environment, stderr=err
            ))  # fmt: skip
    try:
        wait_for_steps(tmp_path)
        ip("-n", hosts[1], "link", "set", f"v{os.getpid()}-2", "down")
        cut = time.monotonic()
        assert [process.wait(90) for process in ranks] == [1, 1], (tmp_path / "0.err").read_text()
        assert time.monotonic() - cut < CUT_TIMEOUT_S + 60, "not the minutes after which TCP gives up"
    finally:
        for process in ranks:
            process.kill()
    report = read_report(tmp_path / "0.json")
    assert report is not None
    assert report.rank == 1
    assert "gives no sign of life" in report.message
    other = read_report(tmp_path / "1.json")
    assert other is not None
    assert "the store, which would know why, does not answer" in other.message or "is gone too" in other.message
    assert other.retry
