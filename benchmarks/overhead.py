"""What does dividing a run between two ranks cost, next to the same run in one process with as many threads?

    python -m benchmarks.overhead [--rounds 3] [--steps 8]

Trains one model on one dataset with the real command, `vidit train`: in one process of two threads, and in two ranks
of one thread each for every way to divide it, one after the other in every round. The global batch is the same.
The ratio is one process's median time of a step over the layout's. Prints a JSON line and writes it to
benchmarks/results/.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.record import write_result
from vidit.data.scene_pack import pack_scenes

# The demo's model, grown until a step is worth dividing: 15 M parameters, 768 tokens a clip.
RUN = (
    "model.num_layers=8", "model.width=384", "model.num_heads=6", "model.mlp_width=1536",
    "model.windows=[[1,0,0],[0,8,8]]", "data.height=128", "data.width=128", "data.num_validation=0",
    "train.optimizer=adamw", "train.global_batch=16", "train.schedule=constant", "train.warmup_steps=0",
    "train.final_learning_rate=0", "train.checkpoint_every=1000000", "train.log_every=1", "sample.prompts=[]",
)  # fmt: skip
MANY = ("train.micro_batch=2",)  # 8 micro-batches for a pipeline
LAYOUTS: dict[str, tuple[str, ...]] = {
    "one process": ("train.micro_batch=16",),
    "tp2": ("parallel.tensor=2", "train.micro_batch=16"),
    "tp2, whole norms": ("parallel.tensor=2", "parallel.sharded_norms=false", "train.micro_batch=16"),
    "sp2 ulysses": ("parallel.sequence=2", "parallel.sequence_kind=ulysses", "train.micro_batch=16"),
    "sp2 window": ("parallel.sequence=2", "parallel.sequence_kind=window", "train.micro_batch=16"),
    "sp2 ring": ("parallel.sequence=2", "parallel.sequence_kind=ring", "train.micro_batch=16"),
    "pp2 1f1b": ("parallel.pipeline=2", "parallel.schedule=1f1b", *MANY),
    "pp2 zero bubble": ("parallel.pipeline=2", "parallel.schedule=zero_bubble", *MANY),
    "zero3": ("parallel.zero=3", "train.micro_batch=8"),
    "zero2": ("parallel.zero=2", "train.micro_batch=8"),
    "dp2": ("parallel.zero=0", "train.micro_batch=8"),
}
WARM = 2  # steps whose time pays for allocation and first messages


def step_seconds(name: str, folder: Path, start: int, steps: int, more: tuple[str, ...]) -> list[float]:
    """Seconds of each step of one start of a layout's run, which goes on where the last one ended."""
    run_dir = folder / name.replace(" ", "-")
    ranks = 1 if name == "one process" else 2
    command = [
        sys.executable, "-m", "vidit.cli", "train", "configs.demo", f"run_dir={run_dir}",
        f"data.train={folder / 'data'}", f"train.steps={start + steps}", f"launch.local={ranks}", *RUN, *more,
        *LAYOUTS[name],
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(2 // ranks)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (run_dir / "speed.jsonl").read_text().splitlines()]
    return [row["step_s"] for row in rows if row["step"] > start + WARM]


def measure(names: list[str], rounds: int, steps: int, more: tuple[str, ...]) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with TemporaryDirectory() as folder:
        pack_scenes(Path(folder) / "data", 64, "train", seed=0, height=128, width=128)
        for number in range(rounds):
            for name in names:
                seconds[name] += step_seconds(name, Path(folder), number * steps, steps, more)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    ratios = {name: medians["one process"] / found for name, found in medians.items()}
    return {"step_s": medians, "ratio": ratios, "all": seconds, "rounds": rounds, "steps": steps, "more": list(more)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of every run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="steps of each layout in a round, warm-up included")
    parser.add_argument("--layouts", nargs="*", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--record", default="overhead", help="name of the file in benchmarks/results")
    arguments = parser.parse_intermixed_args()
    names = ["one process", *(name for name in arguments.layouts if name != "one process")]
    result = measure(names, arguments.rounds, arguments.steps, tuple(arguments.overrides))
    print(json.dumps({name: round(ratio, 3) for name, ratio in result["ratio"].items()}))
    print(write_result(arguments.record, result))


if __name__ == "__main__":
    main()
