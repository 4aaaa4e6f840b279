"""How long do our VAE and those of diffusers take, and in how much memory, at equal widths and compression?

    python -m benchmarks.vae

AutoencoderKLCogVideoX and AutoencoderKLWan with random weights, 4x8x8 and 16 channels, and our presets of the same
names with the same widths and as many residual blocks in each level: the rest of the difference is of design, and
its FLOPs are counted. A third of ours, `wavelet`, has no layer at full size, and stands beside Wan's. diffusers' two
code 8 and 4 frames at a time by themselves; ours is streamed with 8, with 4, and at once. Each is a process of its
own, which codes a small video to warm up; memory is the peak resident size above that of the loaded model. Needs the
extra `export`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
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
def one(system: str, task: str, width: int, frames: int, side: int) -> dict[str, float]:
    """Time, memory and FLOPs of one system and one task, in this process."""
    who, name = system.split()
    part = who.partition("-")[2]
    torch.manual_seed(0)
    vae, encode, decode = ours(name, width, part) if part else diffusers(name, width)
    vae.eval()
    small = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    with FlopCounterMode(display=False) as counter:
        z = encode(small) if task == "encode" else None
        _ = decode(torch.randn(1, 16, 3, 4, 4)) if z is None else z
    shape = (1, 3, frames, side, side) if task == "encode" else (1, 16, 1 + (frames - 1) // 4, side // 8, side // 8)
    given, call = torch.randn(shape), encode if task == "encode" else decode
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    out = call(given)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert out.shape[2:] == (
        (1 + (frames - 1) // 4, side // 8, side // 8) if task == "encode" else (frames, side, side)
    )
    return {
        "seconds": round(seconds, 3),
        "peak_mib": round(peak / 2**20, 1),
        "mflop_per_pixel": round(counter.get_total_flops() / (9 * 32 * 32) / 1e6, 3),
        "million_parameters": round(sum(p.numel() for p in vae.parameters()) / 1e6, 2),
    }


def measure(system: str, task: str, size: list[str]) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.vae", "--one", system, task, *size]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{system} {task} failed: {done.stderr[-2000:]}")
    return {"system": system, "task": task, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("SYSTEM", "TASK"), help="in this process")
    parser.add_argument("--width", type=int, default=32, help="channels of the finest level")
    parser.add_argument("--frames", type=int, default=65)
    parser.add_argument("--side", type=int, default=128)
    arguments = parser.parse_args()
    size = [arguments.width, arguments.frames, arguments.side]
    if arguments.one:
        print(json.dumps(one(*arguments.one, *size)))
        return
    words = [str(w) for pair in zip(("--width", "--frames", "--side"), size, strict=True) for w in pair]
    rows = []
    for system in SYSTEMS:
        for task in ("encode", "decode"):
            rows.append(measure(system, task, words))
            name = system.split()[1]
            theirs = next(r for r in rows if r["system"] == f"diffusers {BESIDE.get(name, name)}" and r["task"] == task)
            rows[-1]["time_of_theirs"] = round(rows[-1]["seconds"] / theirs["seconds"], 2)
            rows[-1]["memory_of_theirs"] = round(rows[-1]["peak_mib"] / theirs["peak_mib"], 2)
            print(json.dumps(rows[-1]), flush=True)
    sizes = dict(zip(("width", "frames", "side"), size, strict=True))
    print(write_result("vae", {**sizes, "threads": torch.get_num_threads(), "load": os.getloadavg()[0], "rows": rows}))


if __name__ == "__main__":
    main()
