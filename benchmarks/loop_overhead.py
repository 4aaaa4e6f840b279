"""What does the training loop cost beyond forward and backward?

    python -m benchmarks.loop_overhead [train.optimizer=adamw]

Trains the demo model on procedural clips with the real loop, and in the same process times the bare forward
and backward of the same model on one resident batch, in alternating rounds. The overhead is given with the
optimizer's update (clipping and averaging included) and without. Prints a JSON line and writes it to
benchmarks/results/.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.record import write_result
from configs.demo import demo
from vidit.config import RunConfig
from vidit.data.catalog import Catalog
from vidit.data.loader import Batch, MicroBatches
from vidit.data.scene_pack import pack_scenes
from vidit.data.shards import read_index
from vidit.overrides import apply_overrides
from vidit.resolve import resolve
from vidit.train.run import run
from vidit.train.step import DitStep
from vidit.train.task import Task, build_task
from vidit.vae.stored import adopt_vae

SECTIONS = ("data_s", "compute_s", "update_s", "log_s")


def bare_seconds(task: Task, batch: Batch, steps: int) -> list[float]:
    """Seconds of each forward and backward pass of the denoiser and text encoder on a resident batch."""
    assert isinstance(task.step, DitStep)
    step, model = task.step, task.model
    x = step.latents(batch)
    noise, t_B = torch.randn_like(x), torch.rand(len(x))
    x_t = step.objective.path.add_noise(x, noise, t_B)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        text = step.text(model, batch.tokens, len(batch.clips.keys))
        output = step.denoise(model, x_t, t_B, text, step.grid(batch), None)
        step.objective.loss(output, x, noise, t_B).mean().backward()
        seconds.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    return seconds


def loop_speed(config: RunConfig, steps: int) -> list[dict[str, float]]:
    """Rows of speed.jsonl, one for each window of `log_every` steps, up to `steps` steps of the run."""
    path = config.directory / "speed.jsonl"
    before = len(path.read_text().splitlines()) if path.is_file() else 0
    run(apply_overrides(config, [f"train.steps={steps}"]))
    return [json.loads(line) for line in path.read_text().splitlines()[before:]]


def measure(folder: Path, rounds: int, steps: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Alternate the loop and the bare passes; medians over all rounds."""
    pack_scenes(folder / "data", 256, "train", seed=0)
    config = apply_overrides(
        demo(),
        [f"run_dir={folder / 'run'}", f"data.train={folder / 'data'}", "data.num_validation=0", "train.log_every=5",
         "train.warmup_steps=0", "train.schedule=constant", "train.final_learning_rate=0",
         "sample.prompts=[]", "train.checkpoint_every=1000000", *overrides],
    )  # fmt: skip
    config = adopt_vae(config)
    resident = apply_overrides(config, [f"run_dir={folder / 'bare'}"])
    resident.directory.mkdir()
    task = build_task(resident, torch.device("cpu"))
    assert task.text is not None
    dataset = MicroBatches(
        task.config.model_copy(update={"data": config.data.model_copy(update={"cache_latents": False})}),
        Catalog.plain(read_index(config.data.train)),
        task.text.tokenizer,
        resolve(config).latent_frames,
    )
    batch = dataset[0]
    bare_seconds(task, batch, 3)
    loop: list[dict[str, float]] = []
    bare: list[float] = []
    for index in range(rounds):
        loop += loop_speed(config, (index + 1) * steps)[1:]
        bare += bare_seconds(task, batch, steps)
    bare_s = statistics.median(bare)
    parts = {name: statistics.median(row[name] for row in loop) for name in ("step_s", *SECTIONS)}
    update = parts["update_s"] / bare_s
    overhead = parts["step_s"] / bare_s - 1
    return {"loop": parts, "bare_s": bare_s, "overhead": overhead, "overhead_without_update": overhead - update}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of configs.demo")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30, help="steps of each kind in a round")
    arguments = parser.parse_intermixed_args()
    with TemporaryDirectory() as folder:
        result = measure(Path(folder), arguments.rounds, arguments.steps, arguments.overrides)
    question = "-".join(("loop-overhead", *(text.partition("=")[2] for text in arguments.overrides)))
    path = write_result(question, {**result, "rounds": arguments.rounds, "steps": arguments.steps})
    print(json.dumps(result))
    print(path)


if __name__ == "__main__":
    main()
