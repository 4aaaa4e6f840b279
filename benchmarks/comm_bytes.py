"""How many bytes does each way of sharding send, and are they those of its formula?

    python -m benchmarks.comm_bytes

Counts one forward and backward pass (`parallel/telemetry.py`) of a small denoiser with the windows of W.A.L.T. on its
two latents, on 4 processes of this machine, and writes JSON and a table to benchmarks/results. Bytes grow with the
width and do not depend on the machine. What is given is a pair of blocks, spatial and spatiotemporal, as the
difference between models of 4 and of 2 blocks: what happens at the ends of the model cancels, and moving back
from the second window to the first counts. The rows of ZeRO are a whole model of 2 blocks in a step of 2
micro-batches.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from benchmarks.rank_pool import Pool
from benchmarks.record import write_result
from parallel.dealing import owners
from parallel.kinds import SequenceKind
from parallel.layout import Layout
from parallel.mesh import Mesh, build_mesh
from parallel.sequence import apply_sequence
from parallel.sharded_norms import apply_sharded_norms
from parallel.telemetry import count_communication
from parallel.tensor import apply_tensor
from parallel.traffic import (
    all_to_all_bytes,
    ring_bytes,
    sharded_norms_bytes,
    share,
    tensor_bytes,
    ulysses_bytes,
    window_bytes,
    zero_bytes,
)
from parallel.zero import Level, apply_zero, zero_micro_batch
from vidit.config import Model
from vidit.model.dit import DiT
from vidit.model.plan import Plan, sharding_plan
from vidit.model.windows import Grid

RANKS, ROWS, CHANNELS, TEXT, MICRO_BATCHES = 4, 1, 8, 16, 2
GRIDS = ((5, 16, 16), (17, 32, 32))  # latent frames, height, width: patches of one
SIZE = 4  # bytes of fp32
WINDOWS = ((1, 0, 0), (0, 8, 8))  # a latent frame; 8 x 8 over all frames


def config(num_layers: int, width: int) -> Model:
    """Self-attention alone: what cross-attention with keys of the window sends would be counted for ulysses only."""
    return Model(
        num_layers=num_layers, width=width, num_heads=4, mlp_width=2 * width, patch=1, windows=WINDOWS,
        cross_attention="none", relative_position="none", attention_backend="sdpa",
    )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What ranks are asked to count; `rank` is for the formula of one of them."""

    kind: str
    grid: tuple[int, int, int]
    num_layers: int
    width: int
    rank: int = 0


@dataclass(frozen=True)
class Kind:
    """One way of sharding: its layout, what it does to the model, and what a rank must send (Run -> bytes)."""

    layout: Layout
    divide: Callable[[DiT, Plan, Mesh], None]
    formula: Callable[[Run], float]
    whole_model: bool = False
    ulysses: int = 0


def _sequence(kind: SequenceKind) -> Callable[[DiT, Plan, Mesh], None]:
    return lambda model, plan, mesh: apply_sequence(model, plan, mesh, kind)


def _tensor(model: DiT, plan: Plan, mesh: Mesh) -> None:
    apply_tensor(model, plan.parameters, plan.regions, mesh.tensor, 4)


def _sharded_norms(model: DiT, plan: Plan, mesh: Mesh) -> None:
    _tensor(model, plan, mesh)
    cut = {name: dims for name, dims in plan.split.items() if name not in plan.positions}
    apply_sharded_norms(
        model, cut, plan.vectors, plan.regions, plan.gather, plan.counted, plan.before, mesh.tensor
    )  # fmt: skip


def _zero(level: Level) -> Kind:
    def divide(model: DiT, plan: Plan, mesh: Mesh) -> None:
        apply_zero(model, [plan.blocks], mesh.zero, level=level)

    def formula(run: Run) -> float:
        with torch.device("meta"):
            named = dict(DiT(config(run.num_layers, run.width), CHANNELS, run.grid, TEXT).named_parameters())
        blocks = [p.shape for n, p in named.items() if n.startswith("blocks.")]
        rest = [p.shape for n, p in named.items() if not n.startswith("blocks.")]
        return zero_bytes(blocks, rest, RANKS, level, MICRO_BATCHES, SIZE)

    return Kind(Layout(shard=RANKS), divide, formula, whole_model=True)


def _tokens(run: Run) -> int:
    t, h, w = run.grid
    return t * h * w


def _pair(one: Callable[..., float], **more: int) -> Callable[[Run], float]:
    """Two blocks of the same formula."""
    return lambda run: 2 * one(ROWS, _tokens(run), run.width, SIZE, RANKS, **more)


def _combined(rows: int, tokens: int, width: int, size: int, ranks: int) -> float:
    """Ulysses among 2 neighbours, whose half of the heads goes around a ring of 2."""
    among = 8 * all_to_all_bytes(rows * share(tokens, ranks) * width * size, 2)
    return among + ring_bytes(rows, tokens, width // 2, size, ranks // 2, size)


def _windows(run: Run) -> float:
    """To the second window and back, of the tokens that change their rank."""
    first, second = (owners(window, run.grid, RANKS) for window in WINDOWS)
    pairs = list(zip(first, second, strict=True))
    leaving = sum(a == run.rank != b for a, b in pairs)
    arriving = sum(a != run.rank == b for a, b in pairs)
    return 2 * window_bytes(ROWS, leaving, arriving, run.width, SIZE)


def _pair_of_tensor(one: Callable[..., float]) -> Callable[[Run], float]:
    """Attention and MLP; the scales of QK-norm of one head."""
    return lambda run: _pair(one, regions=2, per_head=2 * run.width // 4)(run)


KINDS: dict[str, Kind] = {
    "ulysses": Kind(Layout(sequence=RANKS), _sequence("ulysses"), _pair(ulysses_bytes)),
    "ring": Kind(Layout(sequence=RANKS), _sequence("ring"), _pair(ring_bytes, wide=SIZE)),
    "ulysses_ring 2 x 2": Kind(Layout(sequence=RANKS), _sequence("ulysses_ring"), _pair(_combined), ulysses=2),
    "window": Kind(Layout(sequence=RANKS), _sequence("window"), _windows),
    "tensor": Kind(Layout(tensor=RANKS), _tensor, _pair_of_tensor(tensor_bytes)),
    "tensor, sharded norms": Kind(Layout(tensor=RANKS), _sharded_norms, _pair_of_tensor(sharded_norms_bytes)),
    "zero 0": _zero(0),
    "zero 1": _zero(1),
    "zero 2": _zero(2),
    "zero 3": _zero(3),
}


def count(run: Run) -> dict[str, Any]:
    """On this rank: bytes of one step, of which nothing but the kind sends any, and all that was counted."""
    kind, c = KINDS[run.kind], config(run.num_layers, run.width)
    with torch.device("meta"):
        model = DiT(c, CHANNELS, run.grid, TEXT)
    mesh = build_mesh(kind.layout, "cpu", ulysses=kind.ulysses)
    kind.divide(model, sharding_plan(c), mesh)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.constant_(parameter, 0.02)
    micro_batches = MICRO_BATCHES if kind.whole_model else 1
    with count_communication(mesh) as counted:
        for index in range(micro_batches):
            with zero_micro_batch(model, last=index == micro_batches - 1):
                x = torch.randn(ROWS, CHANNELS, *run.grid)
                text = torch.zeros(ROWS, 2, TEXT), torch.zeros(ROWS, 2, dtype=torch.long)
                pooled = torch.zeros(ROWS, TEXT)
                model(x, Grid(*run.grid), torch.full((ROWS,), 500.0), *text, pooled).square().mean().backward()
    return {"bytes": counted.bytes(), "calls": counted.calls(), "counted": counted.as_dict()}


def measure(kinds: Sequence[str], width: int, folder: Path) -> list[dict[str, Any]]:
    """One row for a kind and grid."""
    asked = [(kind, grid) for grid in GRIDS for kind in kinds]
    formulas = [[KINDS[kind].formula(Run(kind, grid, 2, width, r)) for r in range(RANKS)] for kind, grid in asked]
    pool = Pool(folder)
    runs = [Run(kind, grid, layers, width) for kind, grid in asked for layers in (2, 4)]
    answers = [pool.run(RANKS, count, run) for run in runs]
    pool.close()
    rows = []
    for place, (name, grid) in enumerate(asked):
        kind = KINDS[name]
        two, four = answers[2 * place : 2 * place + 2]
        sent = [b["bytes"] - (0 if kind.whole_model else a["bytes"]) for a, b in zip(two, four, strict=True)]
        calls = four[0]["calls"] - (0 if kind.whole_model else two[0]["calls"])
        if kind.whole_model:
            sent, calls = [a["bytes"] for a in two], two[0]["calls"]
        mean, expected = sum(sent) / RANKS, sum(formulas[place]) / RANKS
        rows.append(
            {
                "kind": name, "latent": list(grid), "tokens": grid[0] * grid[1] * grid[2], "calls": calls,
                "bytes": mean, "most": max(sent), "formula": expected, "error": mean / expected - 1,
                "counted": two[0]["counted"],
            }
        )  # fmt: skip
    for row in rows:
        ulysses = [r["bytes"] for r in rows if r["kind"] == "ulysses" and r["latent"] == row["latent"]]
        row["of_ulysses"] = row["bytes"] / ulysses[0] if ulysses and not row["kind"].startswith("zero") else None
    return rows


def table(rows: Sequence[dict[str, Any]], width: int) -> str:
    lines = [
        "# Bytes that each way of sharding sends", "",
        f"`python -m benchmarks.comm_bytes`: {RANKS} ranks, {ROWS} row, fp32, width {width} (bytes of tokens grow "
        "with it), forward and",
        "backward, mean over ranks; the rank that sends most beside it. A pair of blocks; ZeRO: a model of 2 blocks, "
        f"{MICRO_BATCHES} micro-batches.", "",
        "| latent | kind | calls | MB | most | formula | error | of ulysses |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        share = "" if row["of_ulysses"] is None else f"{row['of_ulysses']:.3f}"
        latent = "x".join(str(n) for n in row["latent"])
        amounts = " | ".join(f"{row[name] / 1e6:.3f}" for name in ("bytes", "most", "formula"))
        lines.append(f"| {latent} | {row['kind']} | {row['calls']} | {amounts} | {row['error']:+.2%} | {share} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64, help="of the model; a multiple of 16")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        rows = measure(arguments.kinds, arguments.width, Path(folder))
    path = write_result("comm-bytes", {"ranks": RANKS, "rows_each": ROWS, "width": arguments.width, "rows": rows})
    path.with_suffix(".md").write_text(table(rows, arguments.width))
    print(table(rows, arguments.width))
    print(path)


if __name__ == "__main__":
    main()
