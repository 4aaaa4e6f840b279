"""What do packed rows cost and save next to micro-batches of one bucket, on a mixed set of sizes?

    python -m benchmarks.packed [--steps 4] [--device cuda]

One denoiser with full attention trains on clips of seven shapes, from pictures to 33 frames: in micro-batches of one
bucket each, as many rows as cost what two of the dearest clip do, and in packed rows of as many tokens. Latents are
random, so no VAE and no decoding is measured; forward and backward of the denoiser and of its text encoder are, on one
thread, in CPU seconds, which other work on the machine changes little. On CUDA the model is larger, every clip has four
times the pixels, and seconds are those until the device is done. The two take turns. Beside tokens and FLOPs a
second (of forward and backward; the mixes of shapes differ from step to step) it says, from the order of a run alone:

- fill: tokens of a packed row over its limit; of one micro-batch of a bucket, its cost over that of the dearest.
- 8 ranks: the share of the time that ranks do not wait for the slowest of their round (by FLOPs).
- padded: the share of a batch that would be real if every clip were padded to the largest shape.

Prints a JSON line and writes it to benchmarks/results/.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import write_result
from vidit.batching import clip_tokens
from vidit.config import Bucket, Data, Diffusion, Model, RunConfig, Text, Train, Vae
from vidit.data.buckets import schedule_of
from vidit.data.loader import Batch
from vidit.data.packed import PackedRow
from vidit.data.rows import Clips, named
from vidit.data.schedule import Deal, MicroBatch
from vidit.resolve import grid_of
from vidit.train.passes import PlainPasses
from vidit.train.precision import choose_dtype
from vidit.train.task import dit_task
from vidit.vae.store import load_vae
from vidit.vae.stored import adopt_vae

DEMO_VAE = Path(__file__).parents[1] / "configs/weights/demo_vae"
SHAPES = ((17, 256, 256), (17, 192, 320), (9, 256, 256), (33, 128, 128), (17, 128, 128), (1, 512, 512), (1, 256, 256))
SHARES = (0.15, 0.1, 0.15, 0.1, 0.2, 0.1, 0.2)
"""Of the clips, by shape."""
PER_STEP, RANKS = 8, 8


def shapes_on(device: torch.device) -> tuple[tuple[int, int, int], ...]:
    scale = 2 if device.type == "cuda" else 1
    return tuple((t, scale * h, scale * w) for t, h, w in SHAPES)


def config_of(packed: bool, device: torch.device) -> RunConfig:
    """Both with room for two of the dearest clips in a micro-batch."""
    buckets = tuple(Bucket(num_frames=t, height=h, width=w) for t, h, w in shapes_on(device))
    sizes = {"num_layers": 4, "width": 256, "num_heads": 4, "mlp_width": 1024}
    if device.type == "cuda":
        sizes = {"num_layers": 12, "width": 1024, "num_heads": 16, "mlp_width": 4096}
    model = Model.model_validate(sizes | {
        "patch": 2, "windows": ((0, 0, 0),), "relative_position": "rope", "absolute_position": "none",
        "cross_attention": "all", "cross_keys": "text", "image_attention": "frame", "self_conditioning": 0.0,
    })  # fmt: skip
    config = RunConfig(
        name="packed", model=model, vae=Vae(weights=str(DEMO_VAE)), diffusion=Diffusion(path="flow", target="flow"),
        text=Text(kind="bytes", width=128, num_layers=1, num_heads=4, max_tokens=48, hash_buckets=4096),
        data=Data(train="random", buckets=buckets, num_validation=0, num_frames=17, height=256, width=256),
        train=Train(global_batch=2 * PER_STEP, micro_batch=2),
    )  # fmt: skip
    config = adopt_vae(config)
    if not packed:
        return config
    limit = 2 * max(clip_tokens(config, bucket) for bucket in buckets)
    data = config.data.model_copy(update={"packed_tokens": limit})
    return config.model_copy(update={"data": data, "train": Train(global_batch=PER_STEP, micro_batch=1)})


class Side:
    """One of the two: its model, its order, and what a micro-batch of it took."""

    def __init__(self, packed: bool, device: torch.device):
        self.device, self.config = device, config_of(packed, device)
        dtype = choose_dtype(self.config.train.precision, device)
        self.task = dit_task(self.config, load_vae(DEMO_VAE, device, dtype), device, dtype)
        self.deal: Deal = schedule_of(self.config, SHARES)
        assert isinstance(self.task.passes, PlainPasses)
        self.tokens: list[int] = []
        self.seconds: list[float] = []
        self.flops: list[float] = []

    def step(self, number: int) -> None:
        """Forward and backward of all micro-batches of a step."""
        batches = [self.batch(of) for of in self.deal.step(number)]
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        began = clock()
        self.task.passes.forward_backward(batches)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(clock() - began)
        self.flops.append(3 * sum(self.deal.cost(of) for of in self.deal.step(number)))
        sizes = [(rows, size or shapes_on(self.device)[0]) for batch in batches for rows, size in batch.shapes]
        self.tokens.append(sum(rows * int(np.prod(grid_of(self.config, *size))) for rows, size in sizes))
        self.task.model.zero_grad()

    def batch(self, of: MicroBatch) -> Batch:
        """Random latents of the shapes that are due."""
        g, found, sizes = torch.Generator().manual_seed(of.rows.start), list[Clips](), list[tuple[int, int, int]]()
        for _, bucket, places in of.asked(0, 1):
            t, h, w = size = shapes_on(self.device)[bucket]
            latents = torch.randn(len(places), 16, 1 + (t - 1) // 4, h // 8, w // 8, generator=g)
            found.append(Clips([str(place) for place in places], latents=latents, fps=(8.0,) * len(places)))
            sizes.append(size)
        assert self.task.tokenizer is not None
        captions = self.task.tokenizer(["a red circle moves to the left of a blue square"] * len(of.rows))
        rows = list(of.rows)
        if isinstance(of, PackedRow):
            runs = tuple(zip(sizes, found, strict=True))
            return Batch(rows, named(found), None, captions, rows, of.step_rows, runs=runs)
        return Batch(rows, found[0], None, captions, rows, of.step_rows, size=sizes[0])

    def answer(self) -> dict[str, float]:
        steps = [micro for step in range(100) for micro in self.deal.step(step)]
        costs, waits = [self.deal.cost(one) for one in steps], [self.deal.imbalance(s, RANKS) for s in range(100)]
        limit = self.config.data.packed_tokens
        return {
            "tokens_per_s": sum(self.tokens) / sum(self.seconds),
            "gflops_per_s": sum(self.flops) / sum(self.seconds) / 1e9,
            "fill": statistics.mean(self.tokens) / PER_STEP / limit if limit else statistics.mean(costs) / max(costs),
            "ranks_8": 1 / statistics.mean(waits),
            "cost_spread": statistics.pstdev(costs) / statistics.mean(costs),
            "clips_per_micro_batch": statistics.mean(len(one.rows) for one in steps),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    sides = {name: Side(name == "packed", device) for name in ("buckets", "packed")}
    load = os.getloadavg()[0]
    for number in range(arguments.steps + 1):
        for side in sides.values():
            side.step(number)
            if number == 0:  # the first pays for allocation
                for measured in (side.tokens, side.seconds, side.flops):
                    measured.clear()
    answers = {name: side.answer() for name, side in sides.items()}
    tokens = [clip_tokens(sides["packed"].config, b) for b in sides["packed"].config.data.buckets]
    answers["padded"] = {"fill": float(np.dot(tokens, SHARES)) / max(tokens)}
    result: dict[str, Any] = {"sides": answers, "steps": arguments.steps, "load": load}
    result |= {"tokens": tokens, "raw": {name: [side.tokens, side.seconds] for name, side in sides.items()}}
    print(json.dumps(answers))
    print(write_result("packed" if device.type == "cpu" else "gpu-packed", result))


if __name__ == "__main__":
    main()
