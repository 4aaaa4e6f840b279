"""Training steps of the real DiT and a text encoder on any ZeRO level, in fp64, on ranks and in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from dit_case import ODD, TEXT, Case, batch, grid_of, on_meta, value, wholes
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel import zero
from parallel.dtensor import fill
from parallel.gradients import clip_gradients, gradient_norm
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.replicas import Replicas
from parallel.sequence import apply_sequence
from parallel.telemetry import count_communication
from parallel.tensor import apply_tensor
from parallel.zero import apply_zero, zero_micro_batch
from vidit import config
from vidit.model.plan import sharding_plan
from vidit.train.optim import build_optimizer
from vidit.train.parallelize import recompute

ROWS = 4
SMALL: dict[str, Any] = {"num_layers": 2}


@dataclass(frozen=True)
class Train:
    """One layout and level, `steps` of AdamW of `accumulation` micro-batches; `plant` a bug of PLANTS."""

    layout: dict[str, int]
    level: int
    accumulation: int = 2
    steps: int = 3
    checkpoint: bool = False
    reduce_dtype: torch.dtype | None = None
    overlap: bool = True
    plant: str = ""

    @property
    def case(self) -> Case:
        return Case(self.layout, SMALL, ODD)


@dataclass
class Features:
    """As the text encoders return them: no container that torch knows."""

    features_BLE: Tensor
    pooled_BE: Tensor


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(TEXT, TEXT)])
        self.out = nn.Linear(TEXT, TEXT)

    def forward(self, text_BLE: Tensor) -> Features:
        x = self.out(self.layers[0](text_BLE).tanh())
        return Features(x, x.mean(1))


def build(case: Case) -> nn.ModuleDict:
    with torch.device("meta"):
        return nn.ModuleDict({"dit": on_meta(case), "text": Text().double()})


def losses(model: nn.ModuleDict, rows: dict[str, Tensor | None]) -> Tensor:
    """Mean over the rows, after a first pass without gradient whose output conditions the second."""
    inputs = dict(rows)
    x, target, text = (inputs.pop(name) for name in ("x_BCTHW", "target", "text_BLE"))
    assert x is not None
    assert target is not None
    grid = grid_of(x, inputs)
    features = model["text"](text)
    inputs |= {"text_BLE": features.features_BLE, "pooled_BE": features.pooled_BE}
    with torch.no_grad():
        inputs["previous_BCTHW"] = model["dit"](x, grid, **inputs)
    out = model["dit"](x, grid, **inputs)
    return ((out - target).square() * (1.5 + target.sin())).flatten(1).mean(1).mean()


@dataclass
class Outcome:
    """Gradients and norm of the first step, parameters and loss after the last, what the first step sent.

    `shards` says whether, after a validation, every parameter under the module's names is divided.
    """

    grads: dict[str, Tensor]
    norm: float
    parameters: dict[str, Tensor]
    validation: float
    sent: dict[str, Any]
    shards: bool


def steps(model: nn.ModuleDict, t: Train, data_rank: int, data: int, axes: Any = None) -> Outcome:
    """The loop, the same on ranks and in one process."""
    own = ROWS // (data * t.accumulation)
    c = config.Train(learning_rate=1e-2, eps=1e-6, weight_decay=0.1)
    optimizer = build_optimizer(c, dict(model.named_parameters()))
    grads: dict[str, Tensor] = {}
    sent: dict[str, Any] = {}
    first_norm = 0.0
    for step in range(t.steps):
        with ExitStack() as stack:
            counted = stack.enter_context(count_communication(axes)) if axes and not step else None
            for micro in range(t.accumulation):
                start = (micro * data + data_rank) * own
                rows = {k: None if x is None else x[start : start + own] for k, x in batch(t.case).items()}
                with zero_micro_batch(model, last=micro == t.accumulation - 1, overlap=t.overlap):
                    (losses(model, rows) / t.accumulation).backward()
        norm = gradient_norm(model.parameters())
        if not step:
            sent = counted.as_dict() if counted else {}
            grads = wholes({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
            first_norm = float(norm)
        clip_gradients(model.parameters(), 0.5, norm)
        optimizer.step()
        optimizer.zero_grad()
    size = ROWS // data
    rows = {k: None if x is None else x[data_rank * size : (data_rank + 1) * size] for k, x in batch(t.case).items()}
    with torch.no_grad():
        validation = float(losses(model, rows))
    parameters = wholes(dict(model.named_parameters()))
    shards = all(isinstance(p, DTensor) and any(x.is_shard() for x in p.placements) for p in model.parameters())
    return Outcome(grads, first_norm, parameters, validation, sent, shards)


def single(t: Train) -> Outcome:
    model = build(t.case).to_empty(device="cpu")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(value(name, tuple(p.shape)))
    return steps(model, t, 0, 1)


def on_ranks(t: Train) -> Outcome:
    """On this rank, in the order of `vidit/train/parallelize.py`; the validation is the mean over data ranks."""
    with planted(t.plant):
        layout, case = Layout(**t.layout), t.case
        mesh, plan, model = build_mesh(layout, "cpu"), sharding_plan(case.config), build(case)
        dit: Any = model["dit"]
        if layout.tensor > 1:
            apply_tensor(dit, plan.parameters, plan.regions, mesh.tensor, case.config.num_heads)
        if layout.sequence > 1:
            apply_sequence(dit, plan, mesh, "ulysses")
        for block in dit.blocks.values():
            if t.checkpoint:
                recompute(block)
        blocks = ["dit.blocks.*", "text.layers.*"]
        apply_zero(model, blocks, mesh.zero, level=t.level, reduce_dtype=t.reduce_dtype)  # type: ignore[arg-type]
        model.to_empty(device="cpu")
        for name, p in model.named_parameters():
            fill(p, value(name, tuple(p.shape)))
        outcome = steps(model, t, mesh.data_rank, layout.data, mesh)
        mean = torch.tensor([outcome.validation], dtype=torch.float64)
        dist.all_reduce(mean)
        outcome.validation = float(mean) / dist.get_world_size()
        if dist.get_rank():
            outcome.grads, outcome.parameters = {}, {}
        return outcome


def errors(found: Outcome, expected: Outcome) -> dict[str, float]:
    """Largest relative errors; gradients below 1e-6 of the largest count as that."""
    assert found.grads.keys() == expected.grads.keys()
    floor = 1e-6 * max(float(g.norm()) for g in expected.grads.values())
    return {
        "gradient": max(
            float((found.grads[n] - g).norm()) / max(floor, float(g.norm())) for n, g in expected.grads.items()
        ),
        "norm": abs(found.norm / expected.norm - 1),
        "parameter": max(float((found.parameters[n] - p).norm() / p.norm()) for n, p in expected.parameters.items()),
        "validation": abs(found.validation / expected.validation - 1),
    }


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _own_mean(replicas: Replicas, parameters: Any, sent: Tensor) -> None:
    """What this rank has, as where the group of the bucket is that of another axis."""


def _sums(replicas: Replicas, parameters: Any, sent: Tensor) -> None:
    """Sums go back to the gradients after every micro-batch, and are divided once, at the end of the step."""
    replicas.times = getattr(replicas, "times", 0) + 1  # type: ignore[attr-defined]
    last = replicas.times > len(replicas.prepare())  # type: ignore[attr-defined]
    right_write(replicas, parameters, sent if last else sent * replicas.size)


def _never_synced(root: Any, z: Any, last: bool) -> None:
    right_flags(root, z, last)
    root.set_requires_gradient_sync(False)


def _replicas_forgotten(root: Any, z: Any, last: bool) -> None:
    right_flags(root, z, last)
    root.set_requires_all_reduce(False)


right_write, right_flags = Replicas._write, zero._set_flags
PLANTS: dict[str, list[tuple[Any, str, Any]]] = {
    "replicas not averaged": [(Replicas, "_write", _own_mean)],
    "accumulated gradient summed twice": [
        (Replicas, "_write", _sums),
        (Replicas, "armed", property(lambda self: True, _nothing)),
    ],
    "level 1 never sums": [(zero, "_set_flags", _never_synced)],
    "replicas of shards not summed": [(zero, "_set_flags", _replicas_forgotten)],
    "weights stay gathered": [(zero.Zero, "settle", _nothing)],
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, attribute, bug in PLANTS.get(name, []):
            stack.enter_context(patch.object(owner, attribute, bug, create=True))
        yield
