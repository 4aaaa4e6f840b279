"""Does a run survive ranks that are killed, and what does each kill cost?

    python -m benchmarks.chaos [--kills 20] [--steps 400]

Trains a small model on two ranks twice: undisturbed, and with `launch.max_restarts` while a rank chosen at random is
sent SIGKILL shortly after steps chosen at random, each after the run has trained a step since the last. Both must end,
with losses, norms and keys that are equal bit for bit. A recovery is the time from a kill to the end of the first step
after it; what it is made of is read from goodput.jsonl. Prints a JSON line and writes it to benchmarks/results/.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from benchmarks.record import write_result
from vidit.data.scene_pack import pack_scenes
from vidit.train.goodput import GOODPUT, read_goodput
from vidit.train.metrics import read_metrics
from vidit.whole_file import read_rows

RANKS = 2
PATIENCE_S = 300.0
WITHIN_S = 0.1  # about a step
LAST_STEPS = 20  # without a kill: on a busy machine they are over before a rank is dead
TINY = (
    "data.num_frames=5", "data.height=32", "data.width=32", "data.num_workers=0", "data.num_validation=0",
    "data.cache_latents=false", "model.num_layers=2", "model.width=32", "model.num_heads=4", "model.mlp_width=64",
    "train.global_batch=4", "train.micro_batch=2", "train.warmup_steps=0", "train.schedule=constant",
    "train.final_learning_rate=0", "train.precision=fp32", "train.log_every=5", "sample.prompts=[]",
    "train.validate_every=100000",
)  # fmt: skip


@dataclass
class Disturbed:
    """What was done to a run, and how it ended."""

    code: int
    wall_s: float
    killed_at: list[float] = field(default_factory=list)
    said: str = ""


def command(config: str, run_dir: Path, overrides: Sequence[str]) -> list[str]:
    given = [f"run_dir={run_dir}", f"launch.local={RANKS}", *overrides]
    return [sys.executable, "-m", "vidit.cli", "train", config, *given]


def disturb(words: Sequence[str], run_dir: Path, kill_at: Sequence[int], rng: random.Random) -> Disturbed:
    """Run a command to its end, and kill a rank shortly after the run has first reached each of the steps `kill_at`."""
    began, killed = time.time(), list[float]()
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            while process.poll() is None and len(killed) < len(kill_at):
                last = max(killed, default=began)
                if not _trained_since(run_dir, last) or _reached(run_dir) < kill_at[len(killed)]:
                    if time.time() - last > PATIENCE_S:
                        raise RuntimeError(f"kill {len(killed) + 1} was not reached in {PATIENCE_S:g} s")
                    time.sleep(0.02)
                    continue
                time.sleep(rng.uniform(0.0, WITHIN_S))
                ranks = ranks_of(process.pid)
                if len(ranks) == RANKS:
                    os.kill(rng.choice(ranks), signal.SIGKILL)
                    killed.append(time.time())
            said, _ = process.communicate(timeout=2 * PATIENCE_S)
        finally:
            if process.poll() is None:
                process.terminate()
    return Disturbed(process.returncode, time.time() - began, killed, said)


def _trained_since(run_dir: Path, moment: float) -> bool:
    rows = read_rows(run_dir / GOODPUT)
    return bool(rows) and float(rows[-1]["start"]) > moment


def _reached(run_dir: Path) -> int:
    rows = read_metrics(run_dir)
    return int(rows[-1]["step"]) if rows else 0


def ranks_of(launcher: int) -> list[int]:
    """Processes of the ranks of a launch."""
    told = [child.as_dict(["pid", "cmdline"]) for child in psutil.Process(launcher).children()]
    return [one["pid"] for one in told if "vidit.cli" in (one["cmdline"] or ())]  # a zombie has no command line


def recoveries(run_dir: Path, killed_at: Sequence[float]) -> list[dict[str, float]]:
    """Of each kill: seconds until the next process began, of each part of its start, and in all."""
    firsts: dict[float, dict[str, Any]] = {}
    for row in read_rows(run_dir / GOODPUT):
        firsts.setdefault(row["start"], row)
    found = []
    for moment in killed_at:
        row = min((r for r in firsts.values() if r["start"] > moment), key=lambda r: float(r["start"]))
        parts = {"noticed, ended, started": row["start"] - moment, **row["startup"]}
        found.append({**parts, "all": row["time"] - moment})
    return found


def losses(run_dir: Path) -> list[tuple[Any, ...]]:
    return [(r["step"], r["loss"], r["grad_norm"], r["keys"]) for r in read_metrics(run_dir) if "loss" in r]


def summary(run_dir: Path, whole: Path, disturbed: Disturbed, num_kills: int) -> dict[str, Any]:
    """The answer. RuntimeError where the run did not survive, or is another."""
    if disturbed.code or len(disturbed.killed_at) < num_kills:
        raise RuntimeError(f"exit code {disturbed.code} after {len(disturbed.killed_at)} kills: {disturbed.said}")
    if losses(run_dir) != losses(whole):
        raise RuntimeError(f"the losses of {run_dir} differ from those of {whole}")
    found = read_goodput(run_dir)
    if found.failures != num_kills:
        raise RuntimeError(f"{found.failures} failures after {num_kills} kills: {disturbed.said}")
    each = recoveries(run_dir, disturbed.killed_at)
    times = {name: [one[name] for one in each] for name in each[0]}
    return {
        "kills": num_kills,
        "steps": len(losses(run_dir)),
        "equal": True,
        "recovery_s": {name: {"median": median(v), "worst": max(v)} for name, v in times.items()},
        "goodput": {"disturbed": found.share, "undisturbed": read_goodput(whole).share},
        "disturbed": asdict(found),
        "undisturbed": asdict(read_goodput(whole)),
        "wall_s": disturbed.wall_s,
        "load": os.getloadavg()[0],
        "cores": len(os.sched_getaffinity(0)),
    }


def measure(folder: Path, num_kills: int, steps: int, seed: int, checkpoint_every: int = 10) -> dict[str, Any]:
    pack_scenes(folder / "data", 64, "train", seed=0, num_frames=5, height=32, width=32, workers=0)
    given = [*TINY, f"data.train={folder / 'data'}", f"train.steps={steps}"]
    given.append(f"train.checkpoint_every={checkpoint_every}")
    whole, run_dir = folder / "whole", folder / "run"
    rng = random.Random(seed)
    undisturbed = disturb(command("configs.demo", whole, given), whole, (), rng)
    if undisturbed.code:
        raise RuntimeError(undisturbed.said)
    kill_at = sorted(rng.sample(range(1, steps - LAST_STEPS), num_kills))
    words = command("configs.demo", run_dir, [*given, "launch.max_restarts=5"])
    return summary(run_dir, whole, disturb(words, run_dir, kill_at, rng), num_kills)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        result = measure(Path(folder), arguments.kills, arguments.steps, arguments.seed)
    print(json.dumps(result))
    print(write_result("chaos", result))


if __name__ == "__main__":
    main()
