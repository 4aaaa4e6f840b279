"""What does a training step of the W.A.L.T. DiT cost on one CUDA device, and what takes the time?

    python -m benchmarks.gpu_step [--seconds 600]

A step is forward, backward and fused AdamW on random latents: bf16 compute over fp32 masters, attention through
`scaled_dot_product_attention` but where a row says flash-attn, no second pass of self-conditioning, no clipping, no
average. FLOPs are those of the model (`vidit.model.flops`, three times the forward); MFU is against the rate of large
matrix products that `vidit.train.peak` measures on the same device. Rows of PROFILED also tell which kernels run. Rows
are printed as they are measured; those that do not begin within `--seconds` are left out and named.
"""

import argparse
import gc
import itertools
import json
import re
import statistics
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from benchmarks.record import write_result
from vidit.config import Model, Train
from vidit.model.context import EVERY_FRAME
from vidit.model.dit import DiT
from vidit.model.flops import forward_flops, training_flops
from vidit.model.windows import Grid
from vidit.train.optim import Optimizers, build_optimizer
from vidit.train.peak import peak_flops
from vidit.train.precision import deterministic
from vidit.train.recompute import recompute

CHANNELS, TEXT_WIDTH, TEXT_TOKENS = 8, 256, 32
SMALL, LARGE = (5, 16, 16), (17, 32, 32)  # 17 frames of 128 x 128, 65 frames of 256 x 256
WARMUP, STEPS = 2, 5


@dataclass(frozen=True)
class Row:
    """One way to train one model on one grid."""

    preset: str
    grid: tuple[int, int, int]
    position: Literal["bias", "rope"]
    micro_batch: int
    compile: bool = False
    recompute: bool = False
    deterministic: bool = False
    backend: Literal["sdpa", "flash"] = "sdpa"
    cross_keys: Literal["text", "video_and_text"] = "video_and_text"

    @property
    def model(self) -> Model:
        return Model.preset(
            self.preset, relative_position=self.position, cross_keys=self.cross_keys, self_conditioning=0.0,
            attention_backend=self.backend,
        )  # fmt: skip


ROWS = (
    Row("L", SMALL, "rope", 16, compile=True),
    Row("L", SMALL, "rope", 16, compile=True, cross_keys="text"),
    Row("L", SMALL, "rope", 16, compile=True, cross_keys="text", backend="flash"),
    Row("L", SMALL, "rope", 16, compile=True, deterministic=True),
    Row("3B", SMALL, "rope", 16, compile=True, recompute=True),
    Row("XL", SMALL, "rope", 16, compile=True),
    Row("XL", LARGE, "rope", 4, compile=True, recompute=True),
    Row("L", LARGE, "rope", 1, compile=True),
    Row("L", LARGE, "rope", 4, compile=True, recompute=True),
    Row("L", SMALL, "bias", 16, compile=True),
    Row("L", SMALL, "rope", 16),
    Row("L", SMALL, "rope", 32, compile=True, recompute=True),
    Row("L", LARGE, "bias", 1, compile=True),
    Row("L", SMALL, "bias", 16),
    Row("L", LARGE, "rope", 1),
    Row("L", LARGE, "bias", 1),
    Row("L", SMALL, "rope", 32, recompute=True),
    Row("XL", SMALL, "rope", 12),
)
PROFILED = set(ROWS[:5])
KINDS = (
    ("attention", r"fmha|flash|sdpa|attention"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas"),
    ("AdamW", r"multi_tensor|adam"),
    ("compiled elementwise, norms, casts", r"^triton_"),
    ("layer norms", r"layer_norm|LayerNorm"),
    ("index and sort", r"index|sort|radix|scan"),
    ("copies and casts", r"copy|Memcpy|Memset|CatArray|fill"),
    ("reductions", r"reduce"),
    ("elementwise", r"elementwise"),
)


class Case:
    """A row ready to be stepped, its parameters and inputs random: zeros would be multiplied faster."""

    def __init__(self, row: Row, device: torch.device):
        with torch.device("meta"):
            self.model = DiT(row.model, CHANNELS, row.grid, TEXT_WIDTH)
        self.model.dtype = torch.bfloat16
        for block in self.model.blocks.values():
            if row.recompute:
                recompute(block)
            if row.compile:
                block.compile()
        self.model.to_empty(device=device)
        with torch.no_grad():
            for p in self.model.parameters():
                p.normal_(std=0.02)
        self.optimizer: Optimizers = build_optimizer(Train(), dict(self.model.named_parameters()))
        rows = row.micro_batch
        self.x, self.target = torch.randn(2, rows, CHANNELS, *row.grid, device=device)
        self.grid = Grid(*row.grid)
        self.time = torch.linspace(1, 999, rows, device=device)
        self.text = torch.randn(rows, TEXT_TOKENS, TEXT_WIDTH, device=device)
        self.frame = torch.full((rows, TEXT_TOKENS), EVERY_FRAME, device=device)

    def step(self) -> Tensor:
        out = self.model(self.x, self.grid, self.time, self.text, self.frame)
        loss = (out - self.target).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def measure(row: Row, peak: float, device: torch.device) -> dict[str, Any]:
    """Median time of a step, what follows from it, and peak memory."""
    torch._dynamo.reset()
    counters.clear()
    start = time.perf_counter()
    case = Case(row, device)
    case.step()
    torch.cuda.synchronize()
    first_s = time.perf_counter() - start
    for _ in range(WARMUP):
        case.step()
    torch.cuda.reset_peak_memory_stats()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]
    for event in events[:-1]:
        event.record()
        loss = case.step()
    events[-1].record()
    events[-1].synchronize()
    assert torch.isfinite(loss), "a loss that is not finite is no training step"
    times = [one.elapsed_time(other) for one, other in itertools.pairwise(events)]
    step_ms = statistics.median(times)
    tokens = row.micro_batch * row.grid[0] * row.grid[1] * row.grid[2]
    forward = forward_flops(row.model, row.grid, CHANNELS, TEXT_WIDTH, TEXT_TOKENS)
    flops = training_flops(forward, 0.0) * row.micro_batch
    answer: dict[str, Any] = {
        "step_ms": step_ms, "step_ms_range": (min(times), max(times)), "tokens_per_s": tokens / step_ms * 1e3,
        "flops_per_step": flops, "flops_per_s": flops / step_ms * 1e3, "mfu": flops / step_ms * 1e3 / peak,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30, "first_step_s": first_s,
        "compiled_graphs": counters["stats"]["unique_graphs"],
        "parameters": sum(p.numel() for p in case.model.parameters()),
    }  # fmt: skip
    return answer | ({"kernels": kernels(case)} if row in PROFILED else {})


def kernels(case: Case, most: int = 14) -> dict[str, Any]:
    """Milliseconds of one step by kind of kernel, and of the longest kernels."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        case.step()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            found[event.name][0] += event.time_range.elapsed_us() / 1e3
            found[event.name][1] += 1
    by_kind: dict[str, float] = defaultdict(float)
    for name, (ms, _) in found.items():
        by_kind[kind_of(name)] += ms
    longest = sorted(found.items(), key=lambda item: -item[1][0])[:most]
    return {
        "busy_ms": sum(by_kind.values()),
        "by_kind": dict(sorted(by_kind.items(), key=lambda item: -item[1])),
        "longest": [{"name": name[:120], "ms": ms, "calls": int(calls)} for name, (ms, calls) in longest],
    }


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel)), "other")


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a large copy on the device: what bounds everything elementwise."""
    source = torch.randn(2**30, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return 2 * source.numel() * source.element_size() / best


def measured(row: Row, peak: float, device: torch.device) -> dict[str, Any]:
    """The row and its numbers, or why it has none."""
    try:
        with deterministic(row.deterministic):
            answer = measure(row, peak, device)
    except torch.OutOfMemoryError:
        answer = {"failed": "out of memory"}
    except ImportError:
        answer = {"failed": "flash-attn is not installed"}
    gc.collect()
    torch.cuda.empty_cache()
    return asdict(row) | answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="begin no row after this time")
    arguments = parser.parse_args()
    end = time.perf_counter() + arguments.seconds
    device = torch.device("cuda")
    peak, copy = peak_flops(device, torch.bfloat16), copy_rate(device)
    print(f"bf16 matrix products {peak / 1e12:.0f} TFLOP/s, copies {copy / 1e12:.2f} TB/s", flush=True)
    rows, left_out = [], []
    for row in ROWS:
        if time.perf_counter() > end:
            left_out.append(asdict(row))
            continue
        rows.append(measured(row, peak, device))
        print(json.dumps(rows[-1]), flush=True)
    facts = {"text_tokens": TEXT_TOKENS, "text_width": TEXT_WIDTH, "channels": CHANNELS, "steps": STEPS}
    rates = {"peak_flops_per_s": peak, "copy_bytes_per_s": copy}
    print(write_result("gpu-step", {**rates, **facts, "rows": rows, "left_out": left_out}))


if __name__ == "__main__":
    main()
