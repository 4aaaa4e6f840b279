"""Do PyAV and torchcodec show the same frames, and how long does each take on a processor?

    python -m benchmarks.decoders VIDEOS

Of each video of the folder 9 frames in a row from a third of its time, at 96x64, on one thread, 5 times by each.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.record import write_result
from vidit.data.limits import ClipError
from vidit.data.tar import VIDEO_SUFFIXES
from vidit.data.video import Decoder, decode_clip, probe

REPEATS = 5
DECODERS: tuple[Decoder, ...] = ("pyav", "torchcodec")


def measure(video: bytes) -> dict[str, float]:
    """Mean difference in grey levels, its largest of a frame, and the median milliseconds of each decoder."""
    num_frames = min(9, probe(video).num_frames)
    seconds: dict[str, list[float]] = {name: [] for name in DECODERS}
    shown = {}
    for _ in range(REPEATS):
        for name in DECODERS:
            began = time.perf_counter()
            shown[name] = decode_clip(
                video, num_frames=num_frames, fps=None, height=64, width=96, start_fraction=1 / 3, decoder=name
            )
            seconds[name].append(time.perf_counter() - began)
    apart = (shown["pyav"].float() - shown["torchcodec"].float()).abs().mean((1, 2, 3))
    times = {f"{name}_ms": 1000 * median(found) for name, found in seconds.items()}
    return {"mean": float(apart.mean()), "worst_frame": float(apart.max()), **times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path)
    torch.set_num_threads(1)
    found = {}
    for path in sorted(parser.parse_args().videos.iterdir()):
        if path.suffix[1:].lower() in VIDEO_SUFFIXES:
            try:
                found[path.name] = measure(path.read_bytes())
            except ClipError as error:
                print(f"{path.name}: {error}")
    ratios = [one["torchcodec_ms"] / one["pyav_ms"] for one in found.values()]
    result = {
        "videos": found, "mean_grey_levels": median(one["mean"] for one in found.values()),
        "worst_frame": max(one["worst_frame"] for one in found.values()),
        "torchcodec_over_pyav": {"least": min(ratios), "median": median(ratios), "most": max(ratios)},
    }  # fmt: skip
    print(json.dumps({name: value for name, value in result.items() if name != "videos"}, indent=1))
    print(write_result("decoders", result))


if __name__ == "__main__":
    main()
