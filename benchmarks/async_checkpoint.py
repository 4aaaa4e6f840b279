"""How long does a checkpoint hold the training thread, and what does it cost the steps beside it?

    python -m benchmarks.async_checkpoint [--interval 60] [--duration 240]

A model of about 100M parameters with AdamW and EMA (1.6 GB in fp32) takes steps of matrix products, in three
phases: without saves, saving every `--interval` seconds in the background, and the same with saves that wait. For
each: the share of time inside `save` and `finish`, the median step, and of background saves the steps that ran
beside the writing against those that did not. Prints a JSON line and writes it to benchmarks/results/.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import write_result
from vidit.config import Train
from vidit.train.ema import Ema
from vidit.train.optim import build_optimizer
from vidit.train.state import TrainState

WIDTH, LAYERS, ROWS = 2048, 24, 64


def build(background: bool, width: int, layers: int, device: torch.device) -> TrainState:
    """Square matrices, 24 of 2048 by default: 100.7M parameters."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Linear(width, width, device=device) for _ in range(layers))
    model = nn.ModuleDict({"layers": blocks})
    optimizer = build_optimizer(Train(learning_rate=1e-4), dict(model.named_parameters()))
    return TrainState(model, optimizer, Ema(model, 0.999), background=background)


def take_step(state: TrainState, x_RD: Tensor) -> None:
    y_RD = x_RD
    for layer in state.model["layers"]:
        y_RD = y_RD + torch.tanh(layer(y_RD))
    y_RD.square().mean().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.ema.update(state.model, state.step)
    state.step += 1
    if x_RD.is_cuda:
        torch.cuda.synchronize()


@contextmanager
def timed(into: list[float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    into.append(time.perf_counter() - start)


def phase(state: TrainState, x_RD: Tensor, root: Path, interval_s: float | None, duration_s: float) -> dict[str, Any]:
    """Steps for `duration_s`, with a save every `interval_s`; the first save, which gets its memory, is apart."""
    for _ in range(3):
        take_step(state, x_RD)
    first: list[float] = []
    if interval_s is not None:
        with timed(first):
            state.save(root, {}, keep=1)
        with timed(first):
            state.finish()
    holds: list[float] = []
    beside: list[float] = []
    alone: list[float] = []
    start = last = time.perf_counter()
    while time.perf_counter() - start < duration_s:
        if interval_s is not None and time.perf_counter() - last >= interval_s:
            last = time.perf_counter()
            with timed(holds):
                state.save(root, {}, keep=1)
        with timed(beside if state.saver.writing else alone):
            take_step(state, x_RD)
    elapsed = time.perf_counter() - start
    if interval_s is not None:
        with timed(first):
            state.finish()
    answer: dict[str, Any] = {"seconds": elapsed, "steps": len(alone) + len(beside), "step_s": _median(alone + beside)}
    if interval_s is not None:
        answer |= {"first_save_s": first[0], "first_written_s": first[0] + first[1]}
        answer |= {"saves": len(holds), "held_s": holds, "held_share": sum(holds) / elapsed}
        answer |= {"steps_beside": len(beside), "step_beside_s": _median(beside), "step_alone_s": _median(alone)}
        answer["finish_s"] = first[2]
    return answer


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def measure(interval_s: float, duration_s: float, width: int, layers: int, device: str, folder: Path) -> dict[str, Any]:
    """The three phases, each with a state of its own."""
    on = torch.device(device)
    x_RD = torch.randn(ROWS, width, device=on, generator=torch.Generator(on).manual_seed(0))
    phases: dict[str, Any] = {}
    for name, background, interval in (
        ("none", True, None),
        ("background", True, interval_s),
        ("waiting", False, interval_s),
    ):
        state = build(background, width, layers, on)
        phases[name] = phase(state, x_RD, folder / name, interval, duration_s)
        phases["num_bytes"] = sum(t.numel() * t.element_size() for t in state.tensors().values())
        del state
    none, background, waiting = (
        phases[name]["steps"] / phases[name]["seconds"] for name in ("none", "background", "waiting")
    )
    phases["slowdown_background"] = none / background - 1
    phases["slowdown_waiting"] = none / waiting - 1
    return phases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interval", type=float, default=60.0, help="seconds between saves")
    parser.add_argument("--duration", type=float, default=240.0, help="seconds of each phase")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", help="where checkpoints go; default a temporary folder")
    a = parser.parse_args()
    with TemporaryDirectory(dir=a.folder) as folder:
        result = measure(a.interval, a.duration, a.width, a.layers, a.device, Path(folder))
    asked = {"interval_s": a.interval, "duration_s": a.duration, "width": a.width, "layers": a.layers}
    result = {**asked, "device": a.device, "threads": torch.get_num_threads(), **result}
    path = write_result("async-checkpoint", result)
    print(json.dumps(result))
    print(path)


if __name__ == "__main__":
    main()
