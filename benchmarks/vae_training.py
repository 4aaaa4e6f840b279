"""How well does a small VAE reconstruct real clips that it was not trained on, and how soon?

    python -m benchmarks.vae_training FOLDER --steps 1500

Packs the folder of captioned videos, one in four of its source videos set apart with every clip that was cut from it,
adds procedural scenes, and trains the VAE of `configs.vae:tiny16` on both, at 64x64; section.key=value changes it.
Writes the curve of the clips set apart and the measures of `vidit evaluate` to benchmarks/results/, and beside the run,
in --out, the picture of pairs and the plot. An hour on two cores: --steps 9000 vae.base_channels=32. The videos are
never copied into the project.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.record import write_result
from configs.vae import FEATURES, tiny16
from vidit.config import RunConfig
from vidit.data.pack import pack
from vidit.data.scene_pack import pack_scenes
from vidit.evaluate.reconstruction import evaluate_vae
from vidit.overrides import apply_overrides
from vidit.train.metrics import read_metrics
from vidit.train.run import run

SCENES = 1500
SIZE = 64
HELD_OUT_EVERY = 4


def prepared(source: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Pack `folder`/real, /unseen and /scenes; names of the clips in the first two."""
    rows = [json.loads(line) for line in (source / "clips.jsonl").read_text().splitlines()]
    origins = list(dict.fromkeys(row.get("source_path", row["file"]) for row in rows))
    unseen = set(origins[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
    names = []
    for name in ("real", "unseen"):
        chosen = [row for row in rows if (row.get("source_path", row["file"]) in unseen) == (name == "unseen")]
        names.append([row["file"] for row in chosen])
        if (folder / name / "dataset.json").is_file():
            continue
        videos = folder / f"{name}-videos"
        shutil.rmtree(videos, ignore_errors=True)
        videos.mkdir(parents=True)
        for row in chosen:
            shutil.copyfile(source / row["file"], videos / row["file"])
        (videos / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        pack(videos, folder / name, workers=1, overwrite=(folder / name).exists())
        shutil.rmtree(videos)
    if not (folder / "scenes").exists():
        pack_scenes(folder / "scenes", SCENES, "train", 0, num_frames=9, height=SIZE, width=SIZE, workers=1)
    return names[0], names[1]


def configured(folder: Path, name: str, steps: int, changes: Sequence[str] = ()) -> RunConfig:
    """The run on what `prepared` has packed."""
    mixture = [{"path": str(folder / "real"), "weight": 3.0}, {"path": str(folder / "scenes"), "weight": 1.0}]
    every = max(1, steps // 10)
    return apply_overrides(
        tiny16(),
        [f"name={name}", f"run_dir={folder / name}", "data.train=", f"data.mixture={json.dumps(mixture)}",
         f"data.validation={folder / 'unseen'}", "data.num_validation=64", "data.fps=8", "data.random_crop=true",
         f"train.steps={steps}", f"train.validate_every={every}", f"train.checkpoint_every={every}",
         f"train.warmup_steps={min(50, steps)}", *changes],
    )  # fmt: skip


def curve(run_dir: Path) -> list[dict[str, float]]:
    """The validation of a run."""
    return [{"step": row["step"], **row["validation"]} for row in read_metrics(run_dir) if "validation" in row]


def plotted(path: Path, curves: dict[str, list[dict[str, float]]], quantity: str) -> None:
    """A quantity of validation over steps, one line a run."""
    figure = Figure(figsize=(6, 3.4), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for name, rows in curves.items():
        axes.plot([row["step"] for row in rows], [row[quantity] for row in rows], marker=".", label=name)
    axes.set(xlabel="step", ylabel=quantity)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)


def measure(source: Path, folder: Path, steps: int, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Train, or go on where a run was stopped, and look at the result."""
    seen, unseen = prepared(source, folder)
    config = configured(folder, "real-vae", steps, changes)
    start = time.perf_counter()
    run(config)
    seconds = time.perf_counter() - start
    found = evaluate_vae(config.directory, 64, features=FEATURES)
    scenes = evaluate_vae_of_scenes(config, folder)
    plotted(folder / "curve.png", {"clips not trained on": curve(config.directory)}, "psnr")
    return {
        "steps": steps, "changes": list(changes), "train_s": round(seconds, 1), "real_clips": len(seen),
        "scenes": SCENES, "not_trained_on": unseen, "curve": curve(config.directory), "reconstruction": found,
        "unseen_scenes": scenes,
    }  # fmt: skip


def evaluate_vae_of_scenes(config: RunConfig, folder: Path) -> dict[str, Any]:
    """The same measures on procedural scenes of another seed; the run keeps its own answer."""
    kept = [config.directory / name for name in ("reconstruction.json", "reconstruction.png")]
    contents = [path.read_bytes() for path in kept]
    if not (folder / "other-scenes").exists():
        pack_scenes(folder / "other-scenes", 64, "held_out", 77, num_frames=9, height=SIZE, width=SIZE, workers=1)
    found = evaluate_vae(config.directory, 64, data=str(folder / "other-scenes"), features=FEATURES)
    for path, content in zip(kept, contents, strict=True):
        path.write_bytes(content)
    return found | {"of": "scenes of another seed"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", type=Path, metavar="FOLDER", help="videos with clips.jsonl, as `vidit pack` takes them"
    )
    parser.add_argument("changes", nargs="*", metavar="section.key=value")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=Path("runs/vae-training"))
    arguments = parser.parse_intermixed_args()
    result = measure(arguments.source, arguments.out, arguments.steps, arguments.changes)
    path = write_result("vae-training", result)
    print(json.dumps({name: result[name] for name in ("train_s", "reconstruction", "unseen_scenes")}, indent=1))
    print(path, arguments.out / "real-vae" / "reconstruction.png", arguments.out / "curve.png")


if __name__ == "__main__":
    main()
