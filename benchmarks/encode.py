"""What do stored latents cost, in bytes and rounding, and what do they save?

    python -m benchmarks.encode [--clips 1000] [--steps 40] [--rounds 2]

On procedural clips with the demo's VAE: by how much each dtype of storage moves a latent, in units of the posterior's
standard deviation, and how large a clip is beside its video; how fast `vidit encode` is on one process and on two
ranks; how fast the demo trains on videos, on latents, and on both in one mixture. Writes a file to
benchmarks/results/.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.record import write_result
from configs.demo import demo
from vidit.config import RunConfig
from vidit.data.catalog import Catalog
from vidit.data.loader import MicroBatches
from vidit.data.shards import read_index
from vidit.overrides import apply_overrides
from vidit.train.encode_clips import DTYPES
from vidit.train.step import to_pixels
from vidit.vae.store import load_vae
from vidit.vae.stored import adopt_vae

VIDIT = (sys.executable, "-m", "vidit.cli")


def rounding(config: RunConfig, num: int) -> dict[str, dict[str, float]]:
    """Of `num` clips: the largest and the root mean square of what storing the mean moves it by, over std."""
    cpu = torch.device("cpu")
    vae = load_vae(Path(config.vae.weights or ""), cpu, torch.float32)
    clips = MicroBatches(config, Catalog.plain(read_index(config.data.train)[:num]), None, 1)
    moved: dict[str, list[torch.Tensor]] = {name: [] for name in DTYPES}
    with torch.no_grad():
        for ref in clips.refs:
            posterior = vae.encode(to_pixels(clips.decode(ref)[0][None], cpu))
            std = (0.5 * posterior.log_variance).exp()
            for name, dtype in DTYPES.items():
                moved[name].append((posterior.mean.to(dtype).float() - posterior.mean).abs() / std)
    joined = {name: torch.cat(parts) for name, parts in moved.items()}
    return {name: {"max": float(x.max()), "rms": float(x.square().mean().sqrt())} for name, x in joined.items()}


def timed(*command: object) -> tuple[float, str]:
    """(seconds, output) of a command."""
    start = time.perf_counter()
    done = subprocess.run([*VIDIT, *map(str, command)], check=True, capture_output=True, text=True)
    return time.perf_counter() - start, done.stdout


def media_bytes(folder: Path) -> float:
    """Bytes of a clip's video or latent, in the mean."""
    refs = read_index(folder)
    return sum(ref.video_size for ref in refs) / len(refs)


def training(folder: Path, name: str, steps: int, **options: object) -> dict[str, float]:
    """Clips a second and `data_wait` of the demo, without the ten steps in which workers start; CPU time of it all.

    The CPU time holds the start of the processes too, and says most on a machine that others compute on.
    """
    settings = {
        "run_dir": folder / name, "data.num_validation": 0, "data.cache_latents": "false", "train.steps": steps,
        "train.warmup_steps": 5, "train.log_every": 10, "sample.prompts": "[]",
        **{key.replace("__", "."): v for key, v in options.items()},
    }  # fmt: skip
    before = os.times()
    timed("train", "configs.demo", *(f"{option}={value}" for option, value in settings.items()))
    after = os.times()
    lines = map(json.loads, (folder / name / "speed.jsonl").read_text().splitlines())
    rows = [line for line in lines if "data_wait" in line][1:]
    seconds = sum(row["step_s"] for row in rows)
    return {
        "clips_per_s": sum(row["clips_per_s"] * row["step_s"] for row in rows) / seconds,
        "data_wait": sum(row["data_s"] for row in rows) / seconds,
        "cpu_s": after.children_user + after.children_system - before.children_user - before.children_system,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2, help="of training on each kind, in turn")
    options = parser.parse_args()
    answer: dict[str, Any] = {"clips": options.clips, "steps": options.steps}
    with TemporaryDirectory() as name:
        folder = Path(name)
        videos, latents = folder / "videos", folder / "latents"
        timed("scenes", videos, "--clips", options.clips)
        data = (f"data.train={videos}", "data.cache_latents=false", "data.num_validation=0", "data.num_workers=1")
        config = adopt_vae(apply_overrides(demo(), data))
        answer["rounding_over_std"] = rounding(config, min(256, options.clips))
        seconds, out = timed("encode", "configs.demo", latents, *data)
        answer["encode_s"] = {"one process": seconds}
        print(out)
        answer["encode_s"]["two ranks"], _ = timed("encode", "configs.demo", folder / "two", *data, "launch.local=2")
        answer["bytes_a_clip"] = {"video": media_bytes(videos), "latent": media_bytes(latents)}
        mixture = json.dumps([{"path": str(videos), "weight": 1}, {"path": str(latents), "weight": 1}])
        kinds: dict[str, dict[str, object]] = {
            "videos": {"data__train": videos},
            "latents": {"data__train": latents},
            "both": {"data__train": "", "data__mixture": mixture},
        }
        answer["training"] = [
            {kind: training(folder, f"{kind}-{number}", options.steps, **more) for kind, more in kinds.items()}
            for number in range(options.rounds)
        ]
    print(json.dumps(answer))
    print(write_result("encode", answer))


if __name__ == "__main__":
    main()
