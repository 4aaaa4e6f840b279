"""A run that is killed or told to stop, and started again by the same command, is the run that never stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from parallel import checkpoint
from vidit.cli import main
from vidit.config import RunConfig

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 40, 7
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def config(
    configure: Callable[..., RunConfig],
    config_file: Callable[[Path, RunConfig], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """Accumulation, image rows, self-conditioning, caption dropout, decoding in a worker, random crops."""
    run = configure(
        "",
        model={"self_conditioning": 0.5},
        data={"image_rows": 1, "random_crop": True, "height": 24, "width": 24, "num_workers": 1, "num_validation": 4},
        train={"steps": STEPS, "checkpoint_every": EVERY, "validate_every": 10, "keep_checkpoints": 3},
        sample={"prompts": ()},
    )
    return config_file(tmp_path_factory.mktemp("resume"), run)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, while it is being written too."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint holds; the files' own bytes differ, since safetensors orders its metadata at random."""
    assert checkpoint.verify(folder)["step"] == STEPS
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def last_step(run_dir: Path) -> int:
    return max((row["step"] for row in metrics(run_dir)), default=0)


def finish(process: subprocess.Popen[str], run_dir: Path) -> str:
    """Wait for the end of a run that must succeed; its output."""
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert err == ""
    assert last_step(run_dir) == STEPS
    return out


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 100
    while last_step(run_dir) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def members(session: int) -> list[int]:
    """Processes that are left of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.fixture(scope="module")
def uninterrupted(config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In this process, which decodes too."""
    run_dir = tmp_path_factory.mktemp("resume") / "whole"
    assert main(["train", config, f"run_dir={run_dir}", "data.num_workers=0"]) == 0
    return run_dir


def assert_same(run_dir: Path, expected: Path) -> None:
    """Every loss, gradient norm, key and validation value of every step, and the final tensors, bit for bit."""
    assert (run_dir / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()
    one, other = (tensors(checkpoint.folder_of(folder / "checkpoints", STEPS)) for folder in (run_dir, expected))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not list((run_dir / "checkpoints").glob("*.partial"))


def test_the_uninterrupted_run_is_what_it_should_be(uninterrupted: Path) -> None:
    rows = metrics(uninterrupted)
    train = [row for row in rows if "loss" in row]
    assert [row["step"] for row in train] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "validation" in row] == [10, 20, 30, 40]
    assert all(row["clips"] == 4 * row["step"] and len(row["keys"]) == 2 * (1 + 3) for row in train)
    assert checkpoint.steps(uninterrupted / "checkpoints") == [28, 35, 40]
    early, late = (sum(row["loss"] for row in part) / 10 for part in (train[:10], train[-10:]))
    assert late < early


def test_kill_9_and_again(config: str, command: Start, uninterrupted: Path, tmp_path: Path) -> None:
    run_dir, step = tmp_path / "run", random.Random(20).randint(EVERY + 2, STEPS - 15)
    process = command("train", config, f"run_dir={run_dir}")
    wait_for_step(process, run_dir, step)
    process.kill()
    process.communicate()
    reached, saved = last_step(run_dir), checkpoint.steps(run_dir / "checkpoints")
    assert step <= reached < STEPS, "killed in mid-run"
    assert saved
    deadline = time.monotonic() + 30
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert members(process.pid) == [], "the data workers go with their run"
    # What a power cut does to the file's last line.
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 39, "lo')
    out = finish(command("train", config, f"run_dir={run_dir}"), run_dir)
    assert f"resumed {run_dir} at step {saved[-1]}" in out
    assert_same(run_dir, uninterrupted)


def test_signals_save_and_leave(config: str, command: Start, uninterrupted: Path, tmp_path: Path) -> None:
    """SIGTERM and Ctrl-C as schedulers and terminals send them, to every process of the group; SIGUSR1 to the run."""
    run_dir = tmp_path / "run"
    for step, number, group in ((5, signal.SIGTERM, True), (16, signal.SIGUSR1, False), (24, signal.SIGINT, True)):
        process = command("train", config, f"run_dir={run_dir}")
        wait_for_step(process, run_dir, step)
        if group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        reached = last_step(run_dir)
        assert step <= reached < STEPS, "stopped in mid-run"
        assert checkpoint.steps(run_dir / "checkpoints")[-1] == reached, "nothing is lost"
        assert f"stopped by {number.name} at step {reached}" in out
    finish(command("train", config, f"run_dir={run_dir}"), run_dir)
    assert_same(run_dir, uninterrupted)


DRIVER = """
import os, sys
from vidit.config import RunConfig
from vidit.train import run as runs, run_data
run_data.CLIPS_PER_SHARD = 4
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(0 if runs.run(RunConfig.model_validate_json(line)) else 3)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
LOOKING = {"steps": 14, "checkpoint_every": 5, "validate_every": 4}
KINDS: dict[str, dict[str, Any]] = {
    "cached latents and samples": {
        "data": {"cache_latents": True},
        "train": {**LOOKING, "sample_every": 4},
        "sample": {"prompts": ("a red circle moves left",)},
    },
    "vae": {"train": {**LOOKING, "task": "vae"}},
}


@pytest.fixture(scope="module")
def driver() -> Iterator[subprocess.Popen[str]]:
    """Starts a run for each config that it reads, by a fork: a start then takes no time for its imports."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER], cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        yield process
        assert process.stdin is not None
        process.stdin.close()


def start_and_hit(driver: subprocess.Popen[str], config: RunConfig, after_s: float, number: int | None) -> int:
    """Start a run, send it a signal after some seconds, and return its exit status (3: told to stop)."""
    assert driver.stdin is not None
    assert driver.stdout is not None
    driver.stdin.write(config.model_dump_json() + "\n")
    driver.stdin.flush()
    pid = int(driver.stdout.readline())
    time.sleep(after_s)
    children = Path(f"/proc/{driver.pid}/task/{driver.pid}/children").read_text().split()
    if number is not None and str(pid) in children:  # else it is done already, and the number another's
        os.kill(pid, number)
    sent = time.monotonic()
    status = int(driver.stdout.readline())
    assert number is None or time.monotonic() - sent < 10
    return status


def outcome(run_dir: Path) -> dict[str, Any]:
    """Metrics, samples, the exported VAE and the newest checkpoint's tensors."""
    paths = [run_dir / "metrics.jsonl", *run_dir.glob("samples/*/*"), *run_dir.glob("vae/*")]
    newest = checkpoint.folder_of(run_dir / "checkpoints", LOOKING["steps"])
    found = {name: t.tolist() for path in newest.glob("*.safetensors") for name, t in load_file(path).items()}
    return found | {str(path.relative_to(run_dir)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("kind", KINDS)
def test_signals_at_random_moments(
    driver: subprocess.Popen[str], configure: Callable[..., RunConfig], tmp_path: Path, kind: str
) -> None:
    """SIGKILL and SIGTERM while latents are encoded, in steps, in validations and samples, whatever is hit."""
    began = time.monotonic()
    assert start_and_hit(driver, configure(tmp_path / "whole", **KINDS[kind]), 0, None) == 0
    whole_s = time.monotonic() - began
    moments, config = random.Random(kind), configure(tmp_path / "run", **KINDS[kind])
    for number in (signal.SIGKILL, signal.SIGTERM) * 2:
        status = start_and_hit(driver, config, moments.uniform(0.05, 0.6) * whole_s, number)
        assert status in ((-number, 0) if number == signal.SIGKILL else (-number, 3, 0))
    assert start_and_hit(driver, config, 0, None) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert [row["step"] for row in metrics(tmp_path / "run") if "validation" in row] == [4, 8, 12, 14]
