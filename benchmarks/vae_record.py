"""How well does a trained VAE reconstruct, and where does it come from? Keeps its weights with the answer.

    python -m benchmarks.vae_record runs/demo-vae configs/weights/demo_vae

Copies RUN/vae to the folder and writes beside it `record.json` (environment and config of the run, validation
curve, PSNR and scorer accuracy on procedural scenes that no training saw) and `reconstruction.png`.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vidit.data.scenes import Scene, render, sample_scene
from vidit.evaluate.scenes import ATTRIBUTES, accuracy, judge
from vidit.train.metrics import read_metrics
from vidit.train.step import to_pixels
from vidit.vae.store import load_vae

NUM_SCENES = 128


def reconstruct(folder: Path, scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Original and reconstructed videos, both uint8 (n, T, H, W, 3)."""
    vae = load_vae(folder, torch.device("cpu"), torch.float32)
    originals = torch.stack([torch.from_numpy(render(scene)) for scene in scenes])
    with torch.no_grad():
        decoded = vae.decode(vae.encode(to_pixels(originals, torch.device("cpu"))).mean)
    frames = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return originals, frames.permute(0, 2, 3, 4, 1).contiguous()


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over videos of the peak signal-to-noise ratio, in dB."""
    error = (a.float() - b.float()).square().flatten(1).mean(1)
    return float((10 * torch.log10(255**2 / error)).mean())


def picture(originals: torch.Tensor, decoded: torch.Tensor, rows: int = 6) -> NDArray[np.uint8]:
    """First, middle and last frame of each video, original left and reconstruction right, at twice the size."""
    frames = [0, originals.shape[1] // 2, originals.shape[1] - 1]
    lines = [torch.cat((*originals[i, frames], *decoded[i, frames]), dim=1) for i in range(rows)]
    return torch.cat(lines).repeat_interleave(2, 0).repeat_interleave(2, 1).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    # Seed 77 is no training seed, and held-out scenes are in no training split.
    scenes = [sample_scene(77, i, "held_out" if i % 2 else "train") for i in range(NUM_SCENES)]
    originals, decoded = reconstruct(arguments.run / "vae", scenes)
    judged = [judge(scene, True, video) for scene, video in zip(scenes, decoded, strict=True)]
    record: dict[str, Any] = {
        "psnr_db": round(psnr(originals, decoded), 3),
        "scorer": {name: accuracy(judged, name) for name in (*ATTRIBUTES, "count")},
        "environment": json.loads((arguments.run / "environment.json").read_text()),
        "config": json.loads((arguments.run / "config.json").read_text()),
        "costs": [json.loads(line) for line in (arguments.run / "costs.jsonl").read_text().splitlines()],
        "validation": [row for row in read_metrics(arguments.run) if "validation" in row],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(arguments.run / "vae" / name, arguments.out / name)
    (arguments.out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    Image.fromarray(picture(originals, decoded)).save(arguments.out / "reconstruction.png")
    print(json.dumps({key: record[key] for key in ("psnr_db", "scorer")}))


if __name__ == "__main__":
    main()
