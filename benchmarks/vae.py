"""How long do our VAE and those of diffusers take, and in how much memory, at equal widths and compression?

    python -m benchmarks.vae [--repeats 3]
    python -m benchmarks.vae --device cuda --width 96 --frames 49 --side 480

AutoencoderKLCogVideoX and AutoencoderKLWan with random weights, 4x8x8 and 16 channels, and our presets of the same
names with the same widths and as many residual blocks in each level: the rest of the difference is of design, and
its FLOPs are counted. A third of ours, `wavelet`, has no layer at full size, and stands beside Wan's. diffusers' two
code 8 and 4 frames at a time by themselves; ours is streamed with 8, with 4, and at once. On a CPU, in fp32, each is a
process of its own, which codes a small video to warm up; memory is the peak resident size above that of the loaded
model; of some processes, in turn over all rows, the medians count, for the heap is cut up otherwise each time. On CUDA,
in bf16, each codes the whole video once to warm up, and memory is what tensors take above the weights. Needs the extra
`export`.
"""

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.record import write_result
from vidit.config import Vae
from vidit.model.init import initialise
from vidit.vae.autoencoder import CausalVae
from vidit.vae.coding import decode_clip, encode_clip

# Blocks that a level of theirs has; the two in the middle stand in our coarsest level.
OURS: dict[str, dict[str, Any]] = {
    "cogvideox": {"num_res_blocks": (3, 3, 3, 5), "decoder_res_blocks": (4, 4, 4, 6)},
    "wan": {"num_res_blocks": (2, 2, 2, 4), "decoder_res_blocks": (3, 3, 3, 5)},
}
PARTS = ("diffusers", "ours-4", "ours-8", "ours-whole")
SYSTEMS = (*(f"{who} {name}" for name in OURS for who in PARTS), "ours-4 wavelet")
BESIDE = {"wavelet": "wan"}
Code = Callable[[Tensor], Tensor]


def diffusers(name: str, width: int) -> tuple[nn.Module, Code, Code]:
    from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan

    if name == "wan":
        vae: Any = AutoencoderKLWan(base_dim=width, z_dim=16)
    else:
        widths = (width, 2 * width, 2 * width, 4 * width)
        vae = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=widths,
        )  # fmt: skip
    return vae, lambda x: vae.encode(x).latent_dist.mean, lambda z: vae.decode(z).sample


def ours(name: str, width: int, part: str) -> tuple[nn.Module, Code, Code]:
    limits = Vae.preset(name, base_channels=width, max_frames=0 if part == "whole" else int(part), **OURS.get(name, {}))
    vae = CausalVae(limits)
    initialise(vae, 0)
    return vae, lambda x: encode_clip(vae, x, limits).mean, lambda z: decode_clip(vae, z, limits)


@torch.no_grad()
def one(system: str, task: str, width: int, frames: int, side: int, device: str) -> dict[str, float]:
    """Time, memory and FLOPs of one system and one task, in this process."""
    who, name = system.split()
    part = who.partition("-")[2]
    torch.manual_seed(0)
    vae, encode, decode = ours(name, width, part) if part else diffusers(name, width)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if isinstance(vae, CausalVae):  # keeps fp32 weights, as load_vae leaves it
        vae.eval().to(device).dtype = dtype
    else:
        vae.eval().to(device, dtype)

    def given(frames: int, side: int) -> Tensor:
        latent = (1, 16, 1 + (frames - 1) // 4, side // 8, side // 8)
        return torch.randn((1, 3, frames, side, side) if task == "encode" else latent, device=device, dtype=dtype)

    call = encode if task == "encode" else decode
    with FlopCounterMode(display=False) as counter:
        call(given(9, 32))
    video = given(frames, side)
    seconds, peak, out = (on_cuda if device == "cuda" else on_cpu)(call, video)
    coded = (1 + (frames - 1) // 4, side // 8, side // 8)
    assert out == (coded if task == "encode" else (frames, side, side)), f"{system} {task} gave {out}"
    return {
        "seconds": round(seconds, 3),
        "peak_mib": round(peak / 2**20, 1),
        "mflop_per_pixel": round(counter.get_total_flops() / (9 * 32 * 32) / 1e6, 3),
        "million_parameters": round(sum(p.numel() for p in vae.parameters()) / 1e6, 2),
    }


def on_cpu(call: Code, video: Tensor) -> tuple[float, int, tuple[int, ...]]:
    """Seconds, bytes above those before, and the size of what came out."""
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    size = tuple(call(video).shape[2:])
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, size


def on_cuda(call: Code, video: Tensor) -> tuple[float, int, tuple[int, ...]]:
    """The same; the shortest of three calls after one."""
    call(video)
    torch.cuda.reset_peak_memory_stats()
    before, times, size = torch.cuda.memory_allocated(), [], ()
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        size = tuple(call(video).shape[2:])
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times), torch.cuda.max_memory_allocated() - before, size


def measure(system: str, task: str, size: list[int], device: str) -> dict[str, float]:
    """The same; on a CPU in a process of its own."""
    if device == "cuda":
        row = one(system, task, *size, device)
        gc.collect()
        return row
    words = [str(w) for pair in zip(("--width", "--frames", "--side"), size, strict=True) for w in pair]
    command = [sys.executable, "-m", "benchmarks.vae", "--one", system, task, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{system} {task} failed: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("SYSTEM", "TASK"), help="in this process")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=3, help="on a CPU")
    parser.add_argument("--width", type=int, default=32, help="channels of the finest level")
    parser.add_argument("--frames", type=int, default=65)
    parser.add_argument("--side", type=int, default=128)
    arguments = parser.parse_args()
    size = [arguments.width, arguments.frames, arguments.side]
    if arguments.one:
        print(json.dumps(one(*arguments.one, *size, arguments.device)))
        return
    turns = 1 if arguments.device == "cuda" else arguments.repeats
    runs: dict[tuple[str, str], list[dict[str, float]]] = {(s, t): [] for s in SYSTEMS for t in ("encode", "decode")}
    for _ in range(turns):
        for (system, task), found in runs.items():
            found.append(measure(system, task, size, arguments.device))
            print(system, task, json.dumps(found[-1]), flush=True)
    rows: list[dict[str, Any]] = []
    for (system, task), found in runs.items():
        row = {**found[0], **{name: median(f[name] for f in found) for name in ("seconds", "peak_mib")}}
        rows.append({"system": system, "task": task, **row, "runs": found})
        name = system.split()[1]
        theirs = next(r for r in rows if r["system"] == f"diffusers {BESIDE.get(name, name)}" and r["task"] == task)
        rows[-1]["time_of_theirs"] = round(row["seconds"] / theirs["seconds"], 2)
        rows[-1]["memory_of_theirs"] = round(row["peak_mib"] / theirs["peak_mib"], 2)
        print({name: value for name, value in rows[-1].items() if name != "runs"})
    sizes = dict(zip(("width", "frames", "side"), size, strict=True))
    facts = {**sizes, "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    print(write_result("vae" if arguments.device == "cpu" else "gpu-vae", {**facts, "rows": rows}))


if __name__ == "__main__":
    main()
