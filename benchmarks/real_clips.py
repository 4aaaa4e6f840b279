"""What does a run on real clips cost and reach, from a folder of captioned videos to samples?

    python -m benchmarks.real_clips FOLDER

Packs the folder, trains `configs.clips` on it with the real loop, and times the decoder alone over the same clips.
Prints the summary as JSON and writes it to benchmarks/results/.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.record import write_result
from configs.clips import clips
from vidit.config import RunConfig
from vidit.data.catalog import Catalog
from vidit.data.loader import MicroBatches, usable
from vidit.data.pack import pack
from vidit.data.shards import ClipRef, read_index
from vidit.overrides import apply_overrides
from vidit.resolve import resolve
from vidit.train import run as training
from vidit.train.metrics import read_metrics
from vidit.vae.stored import adopt_vae

ENDS = 20  # steps that the loss is averaged over at either end: one is too noisy to compare


def decode_ms(config: RunConfig, refs: Sequence[ClipRef]) -> list[float]:
    """Milliseconds to read, check and decode each clip in this process, as a worker of the loader does."""
    dataset = MicroBatches(config, Catalog.plain(refs), None, resolve(config).latent_frames)
    milliseconds = []
    for number, ref in enumerate(refs):
        start = time.perf_counter()
        dataset.decode(ref, f"clips/{number}")
        milliseconds.append(1000 * (time.perf_counter() - start))
    return milliseconds


def curves(run_dir: Path) -> dict[str, Any]:
    """Losses, skipped clips and speed, from what the run wrote."""
    rows = read_metrics(run_dir)
    steps = [row for row in rows if "loss" in row]
    losses = [row["loss"] for row in steps]
    # The first window also pays for starting the workers and for the first batch.
    speed = [json.loads(line) for line in (run_dir / "speed.jsonl").read_text().splitlines()]
    speed = speed[1:] or speed
    return {
        "skipped": sum(len(row.get("skipped", ())) for row in steps),
        "loss_first": statistics.mean(losses[:ENDS]),
        "loss_last": statistics.mean(losses[-ENDS:]),
        "validation": {row["step"]: row["validation"]["loss"] for row in rows if "validation" in row},
        **{name: statistics.median(row[name] for row in speed) for name in ("step_s", "clips_per_s", "data_wait")},
    }


def measure(source: Path, folder: Path, steps: int) -> dict[str, Any]:
    """Pack, train, read back."""
    start = time.perf_counter()
    report = pack(source, folder / "data", workers=2)
    packed_s = time.perf_counter() - start
    config = apply_overrides(
        clips(),
        [f"run_dir={folder / 'run'}", f"data.train={folder / 'data'}", f"train.steps={steps}",
         f"train.warmup_steps={min(clips().train.warmup_steps, steps)}", f"train.log_every={min(10, steps)}"],
    )  # fmt: skip
    start = time.perf_counter()
    training.run(config)
    trained_s = time.perf_counter() - start
    run_dir = config.directory
    data = json.loads((run_dir / "data.json").read_text())
    config = adopt_vae(config)
    refs, _, _ = usable(read_index(config.data.train), config)
    milliseconds = decode_ms(config, refs)
    return {
        "packed": len(report.kept),
        "rejected": report.rejected,
        "pack_s": packed_s,
        "used": data["used"],
        "dropped": data["dropped"],
        "cropped": len(data["cropped"]),
        **curves(run_dir),
        "decode_ms": statistics.mean(milliseconds),
        "decode_ms_max": max(milliseconds),
        "samples": len(list((run_dir / "samples").glob("**/*.mp4"))),
        "train_s": trained_s,
        "steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="FOLDER", help="videos with captions, as `vidit pack` takes them")
    parser.add_argument("--steps", type=int, default=clips().train.steps)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        result = measure(arguments.source, Path(folder), arguments.steps)
    path = write_result("real-clips", result)
    print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}))
    print(path)


if __name__ == "__main__":
    main()
