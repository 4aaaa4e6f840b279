"""How do the families learn the same clips, at equal parameters?

    python -m benchmarks.families [--steps 300] [--families walt gentron] [--onto FILE]

Trains a small model of every family on the same procedural scenes with the same optimizer, noise, timesteps and order
of clips, one after the other in one process of one thread. All have as many layers, the same width and heads; what a
family spends on its kinds of attention and modulation it has less in its MLPs, so that parameters are equal. Says the
loss of validation (averaged weights, each family's own), the time of a step, median and least, and how long the files
of vidit/model are. 300 steps tell that a family learns, not which is best. Writes a JSON file and a table to
benchmarks/results/.
"""

import argparse
import json
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.record import write_result
from configs.demo import demo
from vidit.config import FAMILIES, Model, RunConfig
from vidit.data.scene_pack import pack_scenes
from vidit.model.flops import forward_flops, parameter_count
from vidit.resolve import resolve
from vidit.train.encode_run import encode_run
from vidit.train.run import run
from vidit.vae.stored import adopt_vae

ROOT = Path(__file__).parents[1]
LAYERS, WIDTH, HEADS, UNIT = 4, 96, 4, 8
CLIPS, SIDE = 192, 48
# 108 tokens of a clip of 3 x 6 x 6; in Skiparse each sees about a quarter, as one of the paper's does.
SHAPE: dict[str, Any] = {
    "num_layers": LAYERS,
    "width": WIDTH,
    "num_heads": HEADS,
    "patch": 1,
    "text_padding": "masked",
    "time_width": 0,
}
FRAMES = {"given": ({"kind": "random", "share": 0.25},)}
MODELS: dict[str, dict[str, Any]] = {
    "walt": {"windows": ((1, 0, 0), (0, 3, 3)), "self_conditioning": 0.0},
    **{name: {**fields, **SHAPE} for name, fields in FAMILIES.items()},
    "stdit3, frames given": {**FAMILIES["stdit3"], "frame_times": True},
    "gentron, motion free": {**FAMILIES["gentron"], "motion_free": 0.25},
}


def model_of(name: str, parameters: int, base: RunConfig) -> Model:
    """The family with the MLP width that brings it nearest to so many parameters."""
    fields = {**MODELS[name], **SHAPE}
    found = [Model.model_validate({**fields, "mlp_width": width}) for width in range(UNIT, 2048, UNIT)]
    return min(found, key=lambda c: abs(count(c, base) - parameters))


def count(c: Model, base: RunConfig) -> int:
    """Parameters of the denoiser."""
    return parameter_count(c, resolve(base).grid, base.vae.latent_channels, base.text.width)


def config(name: str, folder: Path, steps: int) -> RunConfig:
    """The demo's run with a model of that family."""
    base = adopt_vae(demo())
    parameters = count(Model(**{**MODELS["walt"], **SHAPE, "mlp_width": 768}), base)
    tree = base.model_dump(exclude_unset=True)
    tree["model"] = model_of(name, parameters, base).model_dump(exclude_defaults=True)
    data = {"train": str(folder / "latents"), "num_validation": 32, "height": SIDE, "width": SIDE, "num_workers": 0}
    tree["data"] = {**tree["data"], **data, "cache_latents": False}
    tree["sample"] = {}
    tree["train"] |= {
        "steps": steps, "global_batch": 8, "micro_batch": 8, "optimizer": "adamw", "learning_rate": 2e-3,
        "warmup_steps": min(20, steps), "validate_every": steps, "checkpoint_every": steps, "ema_decay": 0.98,
        "precision": "fp32", "log_every": 1,
    }  # fmt: skip
    if "frame_times" in MODELS[name]:
        tree["diffusion"] |= FRAMES
    run_dir = folder / name.replace(", ", "-").replace(" ", "-")
    return RunConfig.model_validate({**tree, "name": "families", "run_dir": str(run_dir)})


def prepare(folder: Path) -> None:
    """Render the clips and encode them once, for all families."""
    pack_scenes(folder / "data", CLIPS, "train", seed=0, height=SIDE, width=SIDE, workers=1)
    c = config("walt", folder, 1)
    pixels = c.model_copy(update={"data": c.data.model_copy(update={"train": str(folder / "data")})})
    encode_run(pixels, folder / "latents")


def measure(name: str, folder: Path, steps: int) -> dict[str, Any]:
    c = config(name, folder, steps)
    assert run(c)
    rows = [json.loads(line) for line in (c.directory / "metrics.jsonl").read_text().splitlines()]
    speed = [json.loads(line) for line in (c.directory / "speed.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    told = [row["validation"] for row in rows if "validation" in row][-1]
    flops = forward_flops(c.model, resolve(c).grid, c.vae.latent_channels, c.text.width, c.text.max_tokens)
    return {
        "parameters": count(c.model, adopt_vae(c)), "mlp_width": c.model.mlp_width, "gflops_a_clip": flops / 1e9,
        "first_loss": statistics.mean(losses[:10]), "last_loss": statistics.mean(losses[-30:]),
        "validation": told["loss"],
        "step_s": statistics.median(row["step_s"] for row in speed[1:]),
        "fastest_s": min(row["step_s"] for row in speed[1:]),
    }  # fmt: skip


def sizes() -> dict[str, int]:
    """Lines of every file of vidit/model."""
    return {path.name: len(path.read_text().splitlines()) for path in sorted((ROOT / "vidit" / "model").glob("*.py"))}


def table(answer: Mapping[str, Any]) -> str:
    """In markdown."""
    lines = [
        f"# Families at equal parameters, {answer['steps']} steps\n",
        f"`python -m benchmarks.families`, one thread, load of the machine at the start {answer['load']:.1f} on "
        f"{answer['cores']} cores, so of the times the fastest step says most. Losses are means over 10 and 30 "
        "steps; the validation's is of averaged weights.\n",
        "| family | parameters | MLP | GFLOP forward | first loss | last loss | validation | s a step | fastest |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in answer["families"].items():
        lines.append(
            f"| {name} | {r['parameters']:,} | {r['mlp_width']} | {r['gflops_a_clip']:.2f} | {r['first_loss']:.3f} | "
            f"{r['last_loss']:.3f} | {r['validation']:.3f} | {r['step_s']:.3f} | {r['fastest_s']:.3f} |"
        )
    lines += ["\n## Lines of vidit/model\n", "| file | lines |", "|---|---|"]
    lines += [f"| {name} | {n} |" for name, n in answer["sizes"].items()]
    return "\n".join([*lines, f"| in all | {sum(answer['sizes'].values())} |"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--families", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--onto", type=Path, help="a JSON file of this benchmark: keep what is not asked for")
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load, kept = os.getloadavg()[0], json.loads(arguments.onto.read_text())["families"] if arguments.onto else {}
    found: dict[str, Any] = dict(kept)
    with TemporaryDirectory() as folder:
        prepare(Path(folder))
        for name in arguments.families:
            found[name] = measure(name, Path(folder), arguments.steps)
            print(name, json.dumps(found[name]), flush=True)
    ordered = {name: found[name] for name in MODELS if name in found}
    answer = {"families": ordered, "steps": arguments.steps, "load": load, "cores": os.cpu_count(), "sizes": sizes()}
    print(table(answer))
    if not arguments.dry:
        path = write_result("families", answer)
        path.with_suffix(".md").write_text(table(answer))


if __name__ == "__main__":
    main()
