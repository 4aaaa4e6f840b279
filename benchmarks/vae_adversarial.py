"""What does the discriminator do to a VAE that reconstructs already? The same steps with it and without.

    python -m benchmarks.vae_adversarial FOLDER VAE --steps 300

VAE is the folder of a trained `configs.vae:tiny16`, such as what `benchmarks.vae_training` leaves in
OUT/real-vae/vae. Both runs start from it, with the same seed, clips, noise and perceptual loss; one has a
discriminator.
Writes to benchmarks/results/ the measures of `vidit evaluate` of the clips set apart, before and after, and what the
discriminator's losses were: at logits of 0 a hinge loss is 2, and stays there while nothing is learned. Beside the runs
lie pictures of pairs.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.record import write_result
from benchmarks.vae_training import configured, curve, prepared
from configs.vae import FEATURES
from vidit.evaluate.reconstruction import evaluate_vae, judged, pairs
from vidit.train.clips import read_splits
from vidit.train.metrics import read_metrics
from vidit.train.run import run
from vidit.vae.store import load_vae

TRIVIAL = 2.0
"""The discriminator's hinge loss where it says 0 of everything."""
GAN = (
    "vae_train.adversarial_weight=0.5", "vae_train.discriminator_channels=32", "vae_train.lecam_weight=0.001",
    "vae_train.discriminator_rate=2",
)  # fmt: skip
COMMON = (
    "train.learning_rate=5e-4", "train.schedule=constant", "vae_train.perceptual=features",
    f"vae_train.perceptual_files={json.dumps([FEATURES])}", "vae_train.perceptual_weight=0.2",
)  # fmt: skip


def discriminator(run_dir: Path) -> dict[str, Any]:
    """Its losses and answers in tenths of the run."""
    rows = [row for row in read_metrics(run_dir) if "discriminator" in row]
    tenth = max(1, len(rows) // 10)
    parts = [rows[i : i + tenth] for i in range(0, len(rows), tenth)]
    names = ("discriminator", "adversarial", "adversarial_weight", "logits_real", "logits_fake", "lecam")
    return {name: [round(mean(row[name] for row in part), 4) for part in parts] for name in names}


def measure(source: Path, vae: Path, folder: Path, steps: int) -> dict[str, Any]:
    prepared(source, folder)
    result: dict[str, Any] = {"steps": steps, "runs": {}}
    for name, changes in (("without", COMMON), ("with", (*COMMON, *GAN))):
        config = configured(folder, name, steps, [f"vae_train.init={vae}", *changes])
        if "start" not in result:
            given, refs = load_vae(vae, torch.device("cpu"), torch.float32), read_splits(config)[1].refs
            result["start"] = judged(given, list(pairs(config, given, refs)), config, FEATURES)
        start = time.perf_counter()
        run(config)
        step_s = (time.perf_counter() - start) / steps
        found = evaluate_vae(config.directory, 64, features=FEATURES)
        result["runs"][name] = {"step_s": round(step_s, 3), "reconstruction": found, "curve": curve(config.directory)}
    result["discriminator"] = {"trivial": TRIVIAL, **discriminator(folder / "with")}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="FOLDER")
    parser.add_argument("vae", type=Path, metavar="VAE")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/vae-adversarial"))
    arguments = parser.parse_args()
    result = measure(arguments.source, arguments.vae, arguments.out, arguments.steps)
    path = write_result("vae-adversarial", result)
    shown = {"start": result["start"]} | {name: of["reconstruction"] for name, of in result["runs"].items()}
    print(json.dumps(shown | result["discriminator"], indent=1))
    print(path)


if __name__ == "__main__":
    main()
