"""Is a step of training the same on every layout as in one process?

    python -m benchmarks.parity [--layouts tp2 "sp4 ring"] [--models walt full]

For a W.A.L.T. denoiser and one with full attention, and for every layout: the denoiser's output, the gradient of every
parameter, and the losses of five steps of AdamW, on ranks (gloo, one machine) and in one process, in fp64 and in fp32.
Clips and rows of images, an odd number of tokens, a trained text encoder and self-conditioning take part. Errors
are relative to the norm of what one process computes; a gradient below 1e-6 of the largest one counts as that, in fp32,
where it is nothing but rounding (Latte's key biases move no softmax), as the largest. Prints
a table and writes it and a JSON file to benchmarks/results/.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.parity_rows import LAYOUTS, MODELS, ROWS, STEPS, Case
from benchmarks.rank_pool import Pool, TaskError
from benchmarks.record import write_result
from parallel.dtensor import fill
from parallel.exchange import exchange, in_order, num_ranks
from parallel.gradients import clip_gradients, complete_gradients, gradient_norm
from parallel.mesh import build_mesh
from vidit import keys
from vidit.config import ConfigError, RunConfig
from vidit.data.loader import Batch
from vidit.data.rows import Clips
from vidit.model.init import initialise
from vidit.resolve import resolve
from vidit.text.encoder import build_text_encoder
from vidit.train.layout import layout_of
from vidit.train.optim import build_optimizer
from vidit.train.parallelize import build_dit
from vidit.train.precision import choose_dtype
from vidit.train.step import DitStep
from vidit.train.task import passes_of
from vidit.vae.autoencoder import CausalVae


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    """A full parameter, fp64, keyed by its name; what begins at zero in a run would hide what lies behind it."""
    noise = torch.from_numpy(keys.generator(1, "value", name).standard_normal(shape, np.float64))
    return 1 + 0.2 * noise if "norm" in name and "weight" in name else noise / max(3, shape[-1]) ** 0.5


@dataclass
class Result:
    """Output on the rows of one batch, gradients of the first step by name, losses of all steps."""

    output: Tensor
    gradients: dict[str, Tensor]
    losses: list[float]


def batch(config: RunConfig, number: int) -> Batch:
    """Micro-batch `number` of the run: clips and a row of images."""
    frames, height, width = resolve(config).grid
    g = torch.Generator().manual_seed(number)

    def latents(n: int, t: int) -> Clips:
        return Clips([f"{number}/{i}" for i in range(n)], latents=torch.randn(n, 4, t, height, width, generator=g))

    tokenizer = build_text_encoder(config.text).tokenizer
    size = config.train.micro_batch
    captions = [f"caption {number} of {i} words"[: 9 + 4 * i] for i in range(size - 1 + frames)]
    rows = list(range(number * size, (number + 1) * size))
    together = size * resolve(config).data_ranks
    first = number * size // together * together
    return Batch(
        rows, latents(size - 1, frames), latents(frames, 1), tokenizer(captions), range(first, first + together), ROWS
    )


def train(case: Case) -> Result:
    """Five steps on this rank of the case's layout, or in one process."""
    c, cpu = case.config, torch.device("cpu")
    dtype = choose_dtype(c.train.precision, cpu)
    mesh = None
    if num_ranks() > 1:
        ulysses = c.parallel.ulysses if c.parallel.sequence_kind == "ulysses_ring" else 0
        mesh = build_mesh(layout_of(c), "cpu", None, ulysses)
    vae = CausalVae(c.vae)
    initialise(vae, seed=1)
    text = build_text_encoder(c.text, dtype)
    model = build_dit(c, text, cpu, dtype, mesh)
    for name, parameter in model.named_parameters():
        fill(parameter, value(name, tuple(parameter.shape)).to(dtype))
    step = DitStep(c, vae, text, cpu, num_validation=ROWS)
    passes = passes_of(c, model, step, mesh)
    with torch.no_grad():
        output = output_of(step, passes.evaluated, batch(c, 0))
    optimizer = build_optimizer(c.train, dict(model.named_parameters()))
    gradients: dict[str, Tensor] = {}
    losses = []
    data_rank, data_ranks = (mesh.data_rank, mesh.layout.data) if mesh else (0, 1)
    count = ROWS // c.train.micro_batch
    for number in range(STEPS):
        places = range(number * count + data_rank, (number + 1) * count, data_ranks)
        results = passes.forward_backward([batch(c, place) for place in places])
        complete_gradients(model.parameters())
        told = exchange([r.rows_B.tolist() for r in results], mesh.rows if mesh else (None,))
        losses.append(sum(map(sum, in_order(told))) / ROWS)
        if number == 0:
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            gradients = {n: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for n, g in grads.items()}
        pipeline = mesh.pipeline if mesh and mesh.layout.pipeline > 1 else None
        norm = gradient_norm(model.parameters(), pipeline, passes.shared)
        clip_gradients(model.parameters(), 1.0, norm)
        optimizer.step()
        optimizer.zero_grad()
    return Result(output, gradients, losses)


def output_of(step: DitStep, model: Any, given: Batch) -> Tensor:
    inputs = step.inputs(given, "validation")
    video = step.video(given, inputs)
    text = step.text(model, given.tokens, len(given.clips.keys))
    return step.denoise(model, video.x_t, inputs.t_B, text, inputs.grid, None)


def compare(one: Result, ranks: Sequence[Result]) -> dict[str, float]:
    """Largest relative errors of any rank."""
    found: dict[str, Tensor] = {}
    for r in ranks:
        found |= r.gradients
    missing = one.gradients.keys() ^ found.keys()
    if missing:
        raise RuntimeError(f"{len(missing)} of {len(one.gradients)} parameters differ in name: {sorted(missing)[:3]}")
    norms = {name: float(g.norm()) for name, g in one.gradients.items()}
    largest = max(norms.values())
    floor, least = 1e-6 * largest, largest if one.output.dtype == torch.float32 else 1e-6 * largest
    return {
        "forward": max(float((r.output - one.output).norm() / one.output.norm()) for r in ranks),
        "gradient": max(
            float((found[name] - g).norm()) / (norms[name] if norms[name] > floor else least)
            for name, g in one.gradients.items()
        ),
        "loss": max(abs(a / b - 1) for r in ranks for a, b in zip(r.losses, one.losses, strict=True)),
    }


def measured(pool: Pool, references: dict[Any, Result], model: str, name: str) -> dict[str, Any]:
    """One entry; `references` keeps what one process computes for those that come after."""
    wanted = LAYOUTS[name]
    entry: dict[str, Any] = {"model": model, "layout": name, "ranks": wanted.ranks}
    for dtype in ("fp64", "fp32")[: 1 if "compile" in wanted.train else 2]:
        key, case = (model, dtype, wanted.layers, wanted.micro_batch), Case(model, dtype, wanted)
        try:
            _ = case.config
        except ConfigError as error:
            return entry | {"refused": str(error)}
        if key not in references:
            references[key] = pool.run(1, train, Case(model, dtype, wanted.alone))[0]
        try:
            entry[dtype] = compare(references[key], pool.run(wanted.ranks, train, case))
        except (TaskError, RuntimeError) as error:
            entry["failed"] = str(error)[-2000:]
    return entry


def line(entry: Mapping[str, Any]) -> str:
    """One row of the markdown table."""
    if "refused" in entry or "failed" in entry:
        failure = entry.get("failed", "").strip().rpartition("\n")[2]
        why = f"**failed**: {failure}" if failure else f"refused: {entry['refused'].split(';')[0]}"
        return f"| {entry['model']} | {entry['layout']} | {entry['ranks']} | {why} ||||||"
    cells = [f"{entry[t][what]:.0e}" if t in entry else "" for t in ("fp64", "fp32") for what in COLUMNS]
    return f"| {entry['model']} | {entry['layout']} | {entry['ranks']} | {' | '.join(cells)} |"


PAGE = """# Every layout is one training run

Made by `python -m benchmarks.parity` (raw numbers in `benchmarks/results/`): a W.A.L.T. denoiser, one with full
attention and those of [other families](models.md), 75 video tokens, clips and rows of images in one batch, a trained
text encoder; the same step on ranks (gloo) and in one process. *forward* is the error of the denoiser's output,
*gradient* the largest of any parameter, *loss* the largest in five steps of AdamW, all relative.
AdamW divides by a gradient's own size, so in fp32 the rounding of a small one grows in five steps: with `train.eps` of
1e-5 or 1e-3, or plain gradient descent, the rows beyond the limit are at 1e-8 to 8e-8
(`python -m benchmarks.parity_rounding`).

Largest of all eager rows: {eager}. Largest of the compiled ones: {compiled}.
Limits: {limits}. Beyond them: {beyond}.

"""
LIMITS = {
    "fp64": {"forward": 1e-10, "gradient": 1e-10, "loss": 1e-6},
    "fp32": {"forward": 1e-5, "gradient": 1e-5, "loss": 1e-6},
}
COMPILED_LIMIT = 1e-6  # inductor computes some constants in fp32


def beyond(entry: Mapping[str, Any]) -> list[str]:
    """What of a row is over its limit, or that it failed."""
    if "failed" in entry:
        return [f"{entry['model']}, {entry['layout']}: failed"]
    found = []
    for dtype, limits in LIMITS.items():
        for column, limit in limits.items():
            most = max(limit, COMPILED_LIMIT) if "compiled" in entry["layout"] else limit
            if entry.get(dtype, {}).get(column, 0.0) > most:
                found.append(f"{entry['model']}, {entry['layout']}: {dtype} {column} {entry[dtype][column]:.1e}")
    return found


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, and what is largest in it."""

    def largest(chosen: Sequence[Mapping[str, Any]]) -> str:
        found = []
        for dtype in ("fp64", "fp32"):
            measured = [entry[dtype] for entry in chosen if dtype in entry]
            if measured:
                found.append(f"{dtype} " + ", ".join(f"{c} {max(m[c] for m in measured):.0e}" for c in COLUMNS))
        return "; ".join(found) or "none measured"

    compiled = [entry for entry in rows if "compiled" in entry["layout"]]
    eager = [entry for entry in rows if entry not in compiled]
    limits = "; ".join(f"{t} " + ", ".join(f"{c} {most:.0e}" for c, most in of.items()) for t, of in LIMITS.items())
    over = "; ".join(text for entry in rows for text in beyond(entry)) or "none"
    top = PAGE.format(eager=largest(eager), compiled=largest(compiled), limits=limits, beyond=over)
    return top + "\n".join([HEAD, *map(line, rows)]) + "\n"


COLUMNS = ("forward", "gradient", "loss")
HEAD = """| model | layout | ranks | fp64 forward | gradient | loss | fp32 forward | gradient | loss |
|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="*", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    parser.add_argument("--onto", type=Path, help="a JSON file of this benchmark: keep its rows that are not asked for")
    arguments = parser.parse_args()
    asked = [(model, name) for model in arguments.models for name in arguments.layouts]
    kept = json.loads(arguments.onto.read_text())["rows"] if arguments.onto else []
    found = {(row["model"], row["layout"]): row for row in kept}
    references: dict[Any, Result] = {}
    print(HEAD)
    with TemporaryDirectory() as folder:
        pool = Pool(Path(folder), timeout_s=600)  # inductor takes its time
        try:
            for model, name in asked:
                found[model, name] = measured(pool, references, model, name)
                print(line(found[model, name]), flush=True)
                if not arguments.dry:
                    write_result("parity", {"rows": in_table_order(found)})
        finally:
            pool.close()
    rows = in_table_order(found)
    if not arguments.dry:
        (Path(__file__).parents[1] / "docs" / "parity.md").write_text(page(rows))
    faults = [text for entry in rows for text in beyond(entry)]
    if any("fp32 loss" not in text for text in faults):  # which AdamW's division takes beyond its limit
        raise SystemExit("beyond the limits: " + "; ".join(faults))


def in_table_order(found: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [found[model, name] for model in MODELS for name in LAYOUTS if (model, name) in found]


if __name__ == "__main__":
    main()
