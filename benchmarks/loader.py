"""What does vidit's loader deliver next to others, what memory does it hold, and does training wait for it?

    python -m benchmarks.loader VIDEOS

VIDEOS is a folder of H.264 clips (mp4). Four parts, each can be asked for alone by ``--only``:

throughput  clips/s of vidit, webdataset and LitData (where installed) over the same clips, one epoch each in turn,
            once all workers run, with 1 and 2 workers. What they deliver is compared.
memory      resident memory of the process and its workers over many micro-batches of tiny clips.
wait        `data_wait` of the demo's training, its clips decoded in every step, and encoded once as the demo does.
resume      time to the first batch of a run that resumes in the middle of a data set of ``--clips`` clips, part by part,
            and memory a clip (``benchmarks/loader_resume.py``), in fresh processes.

Prints the answer as JSON and writes it to benchmarks/results/.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
from torch import Tensor

from benchmarks.loader_systems import (
    Clip,
    Epoch,
    Shape,
    litdata_system,
    vidit_batches,
    vidit_system,
    webdataset_system,
)
from benchmarks.record import write_result
from vidit.data.encode import encode_mp4
from vidit.data.shard_writer import ShardWriter
from vidit.data.video import probe

PARTS = ("throughput", "memory", "wait", "resume")
SHARDS = 8  # so that two workers of a loader that deals whole shards get the same work
TINY_CLIPS = 1000


def clips_of(videos: Path, shape: Shape, copies: int) -> list[Clip]:
    """Every long enough clip of a folder `copies` times, each under a key of its own. ValueError if there is none."""
    paths = [path for path in sorted(videos.glob("*.mp4")) if probe(path).num_frames >= shape.num_frames]
    if not paths:
        raise ValueError(f"{videos} holds no .mp4 of {shape.num_frames} frames or more; name a folder of clips")
    if copies % SHARDS:
        raise ValueError(f"--copies {copies} is no multiple of {SHARDS}, so shards and micro-batches would not be even")
    return [(f"{path.stem}-{copy:03d}", path) for copy in range(copies) for path in paths]


def prepared(clips: list[Clip], folder: Path, shape: Shape) -> dict[str, Epoch]:
    """The systems that can run here, by name."""
    per_shard = len(clips) // SHARDS
    systems = {"vidit": vidit_system(clips, folder / "tars", shape, per_shard)}
    systems["webdataset"] = webdataset_system(sorted((folder / "tars").glob("*.tar")), shape)
    if litdata := litdata_system(clips, folder / "chunks", shape, per_shard):
        systems["litdata"] = litdata
    else:
        print("litdata is not installed: left out")
    return systems


@dataclass(frozen=True)
class Timing:
    """What one epoch cost once all workers ran, and what came: the number of clips, and a sum over their pixels
    that does not depend on their order."""

    clips_per_s: float
    cpu_ms_per_clip: float
    delivered: tuple[int, int]


def timed(batches: Iterator[Tensor], workers: int) -> Timing:
    """Time from the arrival of the last worker's first batch to that of the last batch."""
    counts, sums, moments = [], [], []
    for pixels in batches:
        moments.append((time.perf_counter(), _cpu_s()))
        counts.append(len(pixels))
        sums.append(int(pixels[:, :, ::8, ::8].sum()))
    wall_s, cpu_s = (end - start for start, end in zip(moments[workers - 1], moments[-1], strict=True))
    later = sum(counts[workers:])
    return Timing(later / wall_s, 1000 * cpu_s / later, (sum(counts), sum(sums)))


def _cpu_s() -> float:
    """Processor time that this process and its children have used."""
    this = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (this, *this.children(recursive=True)))


def throughput(clips: list[Clip], folder: Path, shape: Shape, rounds: int) -> dict[str, Any]:
    """Medians over rounds, in which the systems take turns; ratios are vidit's over another's of the same round."""
    systems, answer = prepared(clips, folder, shape), {}
    for workers in (1, 2):
        timings: dict[str, list[Timing]] = {name: [] for name in systems}
        loads = []
        for number in range(rounds):
            loads.append(os.getloadavg()[0])
            turns = list(systems)[number % len(systems) :] + list(systems)[: number % len(systems)]
            for name in turns:
                timings[name].append(timed(systems[name](number, workers), workers))
                print(
                    f"{workers} workers, round {number}, load {loads[-1]:.1f}: {name} {timings[name][-1]}", flush=True
                )
            if len({timings[name][-1].delivered for name in systems}) > 1:
                raise RuntimeError(f"the systems deliver different clips (number, sum of pixels): {timings}")
        speeds = {name: [timing.clips_per_s for timing in values] for name, values in timings.items()}
        best = {name: max(values) for name, values in speeds.items()}
        cpu = {name: [timing.cpu_ms_per_clip for timing in values] for name, values in timings.items()}
        answer[f"{workers} workers"] = {
            "clips_per_s": {name: statistics.median(values) for name, values in speeds.items()},
            "ratio": {name: _median_ratio(speeds["vidit"], speeds[name]) for name in systems if name != "vidit"},
            "ratio_of_best_rounds": {name: best["vidit"] / best[name] for name in systems if name != "vidit"},
            "cpu_ms_per_clip": {name: statistics.median(values) for name, values in cpu.items()},
            "rounds": {"clips_per_s": speeds, "cpu_ms_per_clip": cpu, "load_before": loads},
        }
    return answer


def _median_ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def memory(folder: Path, num_batches: int) -> dict[str, Any]:
    """Resident MiB of this process and of its children together, 200 times over a looped data set of tiny clips."""
    generator = np.random.default_rng(0)
    with ShardWriter(folder) as writer:
        for number in range(TINY_CLIPS):
            frames = generator.integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
            writer.add(f"tiny-{number:04d}", encode_mp4(frames, 8), {"caption": "noise"})
    samples: dict[str, list[float]] = {"own": [], "children": []}
    start = time.perf_counter()
    for number, _ in enumerate(vidit_batches(folder, Shape(1, 16, 2), workers=1, start=0, end=num_batches)):
        if number % (num_batches // 200) == 0:
            process = psutil.Process()
            samples["own"].append(process.memory_info().rss / 2**20)
            samples["children"].append(sum(p.memory_info().rss for p in process.children(recursive=True)) / 2**20)
    seconds = time.perf_counter() - start
    settled = {name: values[len(values) // 10 :] for name, values in samples.items()}
    settled["both"] = [sum(pair) for pair in zip(*settled.values(), strict=True)]
    return {
        "micro_batches": num_batches,
        "seconds": seconds,
        "growth": {name: values[-1] / values[0] - 1 for name, values in settled.items()},
        "spread": {name: max(values) / min(values) - 1 for name, values in settled.items()},
        "mib": {name: [round(value, 1) for value in values] for name, values in samples.items()},
    }


def wait(folder: Path, steps: int) -> dict[str, Any]:
    """`data_wait`, of every ten steps and of all after the first ten, by what is done to the clips."""
    vidit = [sys.executable, "-m", "vidit.cli"]
    subprocess.run([*vidit, "scenes", str(folder / "scenes"), "--clips", "1000"], check=True, stdout=subprocess.DEVNULL)
    answer = {}
    for name, cached in (("decoded in every step", "false"), ("encoded once", "true")):
        run_dir = folder / f"cached-{cached}"
        options = {
            "run_dir": run_dir, "data.train": folder / "scenes", "data.num_workers": 1, "data.cache_latents": cached,
            "train.steps": steps, "train.warmup_steps": 5, "train.log_every": 10,
        }  # fmt: skip
        command = [*vidit, "train", "configs.demo", *(f"{option}={value}" for option, value in options.items())]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = map(json.loads, (run_dir / "speed.jsonl").read_text().splitlines())
        rows = [line for line in lines if "data_wait" in line]
        later = rows[1:]  # the first ten steps also pay for starting the worker
        answer[name] = {
            "data_wait": sum(row["data_s"] for row in later) / sum(row["step_s"] for row in later),
            "rows": [{key: row[key] for key in ("step", "step_s", "data_s", "data_wait")} for row in rows],
        }
    return answer


def resume(folder: Path, num_clips: int, trials: int) -> dict[str, Any]:
    """Each trial in a process of its own, in this one and in a worker."""
    program = [sys.executable, "-m", "benchmarks.loader_resume"]
    subprocess.run([*program, "make", folder, "--clips", str(num_clips)], check=True)
    answer: dict[str, Any] = {}
    for workers in (0, 1):
        command = [*program, "measure", folder, "--clip", str(num_clips // 2), "--workers", str(workers)]
        found = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(trials)]
        seconds = [one["seconds"]["all"] for one in found]
        answer[f"{workers} workers"] = {"all_s": seconds, "median_s": statistics.median(seconds), "trials": found}
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path, metavar="VIDEOS", help="folder of mp4 clips")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument(
        "--copies", type=int, default=8, help="how often each clip stands in the data set (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=50_000, help="micro-batches of the memory part")
    parser.add_argument("--steps", type=int, default=40, help="steps of the wait part")
    parser.add_argument("--clips", type=int, default=2_000_000, help="clips of the resume part (%(default)s)")
    parser.add_argument("--trials", type=int, default=5, help="starts of the resume part (%(default)s)")
    parser.add_argument("--record", default="loader", help="name of the result's file")
    options = parser.parse_args()
    shape = Shape()
    answer: dict[str, Any] = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        if "memory" in options.only:  # first, while this process holds little else
            answer["memory"] = memory(folder / "tiny", options.batches)
        if "throughput" in options.only:
            clips = clips_of(options.videos, shape, options.copies)
            answer["clips"] = len(clips)
            answer["throughput"] = throughput(clips, folder, shape, options.rounds)
        if "resume" in options.only:
            answer["resume"] = resume(folder / "resume", options.clips, options.trials)
        if "wait" in options.only:
            answer["wait"] = wait(folder, options.steps)
    print(json.dumps(answer))
    print(write_result(options.record, answer))


if __name__ == "__main__":
    main()
