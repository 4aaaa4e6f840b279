"""How much memory does a VAE take for a long video, streamed and at once?

    python -m benchmarks.vae_memory [--repeats 3]

Each length is a process of its own that makes a video chunk by chunk, encodes it, decodes the latents and drops the
pixels. What it says is its peak resident size (`ru_maxrss`), of which the median of some processes counts, for the heap
is cut up otherwise each time; what grows is compared with the shortest video.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import write_result
from vidit.config import Vae
from vidit.model.init import initialise
from vidit.vae.autoencoder import CausalVae
from vidit.vae.streaming import stream_decode, stream_encode

LENGTHS = {64: (17, 65, 257, 1025), 256: (17, 65, 257)}
AT_ONCE = {64: (17, 65, 257), 256: (17, 65)}
CHUNK = 8


def small() -> CausalVae:
    """W.A.L.T.'s autoencoder, 4x8x8, at an eighth of its width and with one block a level."""
    blocks = {"num_res_blocks": (1, 1, 1, 1), "decoder_res_blocks": (1, 1, 1, 1)}
    vae = CausalVae(Vae.preset("walt", base_channels=16, **blocks))
    initialise(vae, 0)
    return vae.requires_grad_(False)


def frames(num_frames: int, side: int) -> Iterator[Tensor]:
    """A video that is never whole in memory."""
    g = torch.Generator().manual_seed(0)
    for start in range(0, num_frames, CHUNK):
        yield torch.rand(1, 3, min(CHUNK, num_frames - start), side, side, generator=g) * 2 - 1


@torch.no_grad()
def code(num_frames: int, side: int, streamed: bool) -> None:
    """Encode and decode one video."""
    vae = small()
    if streamed:
        latents = (part.mean for part in stream_encode(vae, frames(num_frames, side)))
        seen = sum(part.shape[2] for part in stream_decode(vae, latents))
    else:
        seen = vae.decode(vae.encode(torch.cat(list(frames(num_frames, side)), 2)).mean).shape[2]
    assert seen == num_frames


def measure(num_frames: int, side: int, streamed: bool) -> dict[str, float]:
    """Peak memory and time of a process that codes one video."""
    command = [sys.executable, "-m", "benchmarks.vae_memory", "--one", str(num_frames), str(side), str(int(streamed))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"frames": num_frames, "side": side, "streamed": streamed, **json.loads(done.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, type=int, metavar="N", help="frames, side, 1 where streamed: in this process")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    one = arguments.one
    if one:
        start = time.perf_counter()
        code(one[0], one[1], bool(one[2]))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"peak_mib": round(peak, 1), "seconds": round(time.perf_counter() - start, 1)}))
        return
    rows: list[dict[str, Any]] = []
    for side, lengths in LENGTHS.items():
        for streamed in (True, False):
            for num_frames in lengths if streamed else AT_ONCE[side]:
                found = [measure(num_frames, side, streamed) for _ in range(arguments.repeats)]
                peaks = [run["peak_mib"] for run in found]
                rows.append({**found[0], "peak_mib": median(peaks), "peaks_mib": peaks})
                print(json.dumps(rows[-1]), flush=True)
    by_side = {side: [r["peak_mib"] for r in rows if r["side"] == side and r["streamed"]] for side in LENGTHS}
    growth = {side: round(max(p) / min(p) - 1, 4) for side, p in by_side.items()}
    print(json.dumps({"growth": growth}))
    print(write_result("vae-memory", {"chunk": CHUNK, "growth": growth, "load": os.getloadavg()[0], "rows": rows}))


if __name__ == "__main__":
    main()
