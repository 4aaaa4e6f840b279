"""A training state of the real DiT on any layout, in fp64, saved and loaded by ranks."""

from __future__ import annotations

import copy
import errno
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from dit_case import Case, average, batch, loss, on_meta, value, wholes
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

from parallel import async_save, checkpoint, matrices
from parallel.checkpoint import Saver
from parallel.dtensor import Box, fill, local, local_box
from parallel.exchange import exchange
from parallel.layout import Layout
from parallel.mesh import Mesh, build_mesh
from parallel.sequence import apply_sequence
from parallel.tensor import apply_tensor
from parallel.zero import Zero, apply_zero
from vidit.config import Train
from vidit.model.plan import sharding_plan
from vidit.train.ema import Ema
from vidit.train.optim import build_optimizer
from vidit.train.state import TrainState

# 42 over 2 tensor ranks is 21, which 2 ZeRO ranks divide into 11 and 10.
MODEL = {"num_layers": 2, "mlp_width": 42}
TRAIN = Train(optimizer="muon", learning_rate=1e-2, weight_decay=0.1)
STEPS = 2


@dataclass(frozen=True)
class Job:
    """`folder`: where checkpoints go, or the one to load. `layout` None: one process without a group."""

    layout: dict[str, int] | None
    folder: Path
    zero: bool = True
    keep_gathered: bool = False
    background: bool = False


def build(job: Job, seed: int) -> tuple[TrainState, Mesh | None]:
    """Model, optimizer and average with initial values of a seed, in the order of `vidit/train/parallelize.py`."""
    case = Case(job.layout or {}, MODEL)
    model, plan, mesh = on_meta(case), sharding_plan(case.config), None
    if job.layout is not None:
        layout = Layout(**job.layout)
        mesh = build_mesh(layout, "cpu")
        if layout.tensor > 1:
            apply_tensor(model, plan.parameters, plan.regions, mesh.tensor, case.config.num_heads)
        if layout.sequence > 1:
            apply_sequence(model, plan, mesh, "ulysses")
        if job.zero:
            apply_zero(model, [plan.blocks], mesh.zero, level=2 if job.keep_gathered else 3)
    model.to_empty(device="cpu")
    for name, p in model.named_parameters():
        fill(p, value(f"{seed} {name}", tuple(p.shape)))
    state = nn.ModuleDict({"dit": model})
    optimizer = build_optimizer(TRAIN, dict(state.named_parameters()))
    return TrainState(state, optimizer, Ema(state, 0.9), background=job.background), mesh


def train(state: TrainState, mesh: Mesh | None, job: Job, steps: int) -> None:
    model = state.model["dit"]
    for _ in range(steps):
        rows = slice(None)
        if mesh is not None:
            size = 4 // mesh.layout.data
            rows = slice(mesh.data_rank * size, (mesh.data_rank + 1) * size)
        inputs = {k: None if x is None else x[rows] for k, x in batch(Case({}, MODEL)).items()}
        loss(model, {**inputs, "time_B": inputs["time_B"] / (1 + state.step)})[0].backward()
        if mesh is not None and not job.zero:
            average(model, mesh.root)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.ema.update(state.model, state.step)
        state.step += 1
        state.clips += 4


def full(state: TrainState) -> dict[str, Tensor]:
    """Whole copies of every tensor, on the first rank."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    copies = wholes(state.tensors())
    return copies if first else {}


def save(job: Job) -> dict[str, Tensor]:
    """Train, save; the tensors as they were."""
    state, mesh = build(job, 1)
    train(state, mesh, job, STEPS)
    expected = full(state)
    state.save(job.folder, {"name": "x"}, keep=3)
    if job.background:
        with torch.no_grad():
            for tensor in state.tensors().values():
                tensor.zero_()  # the training goes on at once
    state.finish()
    return expected


def load(job: Job) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors after loading over other values, and after one more step."""
    state, mesh = build(job, 2)
    facts = state.load(job.folder)
    assert (state.step, state.clips, facts["name"]) == (STEPS, 4 * STEPS, "x")
    loaded = full(state)
    train(state, mesh, job, 1)
    return loaded, full(state)


def outcome(call: Callable[[], Any]) -> str:
    try:
        call()
    except checkpoint.CheckpointError as error:
        return str(error)
    return "done"


def load_outcome(job: Job) -> tuple[str, bool]:
    """(what loading says, whether every tensor is as it was before)"""
    state, _ = build(job, 2)
    before = wholes(state.tensors())
    said, after = outcome(lambda: state.load(job.folder)), wholes(state.tensors())
    return said, all(torch.equal(before[name], t) for name, t in after.items())


def stages(folder: Path) -> tuple[str, list[str]]:
    """Two pipeline stages: names of their own and a shared one, loaded by the stage that did not save them."""
    me = dist.get_rank()
    shared = {"model.embed": torch.arange(6.0)}
    own = {f"model.{me}.{n}": torch.full((3, n + 1), me + n / 8) for n in range(3)}
    checkpoint.save(folder, 1, {**shared, **own}, {})
    other = {name.replace(f".{me}.", f".{1 - me}."): torch.zeros_like(t) for name, t in own.items()}
    again = {"model.embed": torch.zeros(6)}
    checkpoint.load(checkpoint.folder_of(folder, 1), {**again, **other}, prefix="")
    assert torch.equal(again["model.embed"], shared["model.embed"])
    for n in range(3):
        assert (other[f"model.{1 - me}.{n}"] == 1 - me + n / 8).all()
    half = dict(list(other.items())[:2]) if me == 0 else other
    return outcome(lambda: checkpoint.load(checkpoint.folder_of(folder, 1), half, prefix="")), list(own)


def failing_save(job: Job) -> tuple[str, str, str]:
    """The disk of rank 1 is full at step 2, in the background; what the ranks hear, when, and after the next save.

    The plan is made once.
    """
    with patch.object(async_save, "make_plan", wraps=async_save.make_plan) as planning:
        heard = _failing_save(job)
    assert planning.call_count == 1
    return heard


def _failing_save(job: Job) -> tuple[str, str, str]:
    state, mesh = build(job, 1)
    train(state, mesh, job, 1)
    state.save(job.folder, {}, keep=3)
    state.finish()
    train(state, mesh, job, 1)

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with patch.object(async_save, "write", fail) if dist.get_rank() == 1 else nullcontext():
        first = outcome(lambda: state.save(job.folder, {}, keep=3))
        second = outcome(state.finish)
    train(state, mesh, job, 1)
    return first, second, outcome(lambda: [state.save(job.folder, {}, keep=3), state.finish()])


def gathered_average(job: Job) -> bool:
    """ZeRO-2 keeps gathered weights after a forward pass; the average in their place is seen, and undone."""
    state, mesh = build(job, 1)
    train(state, mesh, job, STEPS)
    rows = {k: None if x is None else x[:2] for k, x in batch(Case({}, MODEL)).items()}
    with torch.no_grad():
        plain = loss(state.model["dit"], rows)[0]
        with state.ema.applied(state.model):
            averaged = loss(state.model["dit"], rows)[0]
        again = loss(state.model["dit"], rows)[0]
    return bool(plain == again) and bool(plain != averaged)


def save_planted(job: Job) -> dict[str, Tensor]:
    """As `save`, but Muon takes each rank's part for the matrix."""
    with patch.object(matrices, "cuts", lambda like: []):
        return save(job)


def mixed(plant: bool) -> float:
    """AdamW and the average over plain parameters and two kinds of DTensors in one model: their largest error.

    `plant`: the average of the divided model misses its updates.
    """
    torch.manual_seed(0)
    alone = nn.ModuleDict({"zero": nn.Linear(5, 3), "tensor": nn.Linear(4, 6), "plain": nn.Linear(3, 2)}).double()
    model = copy.deepcopy(alone)
    mesh = build_mesh(Layout(shard=2, tensor=2), "cpu")
    apply_tensor(model["tensor"], {"weight": "column", "bias": "column"}, {}, mesh.tensor, 2)
    apply_zero(model["zero"], [], mesh.zero)
    kinds = {type(p.data) for p in model.parameters()} | {
        p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")
    }
    assert len(kinds) == 4, "plain, DTensor, two meshes"
    pairs = [
        (build_optimizer(Train(learning_rate=0.1, weight_decay=0.1), dict(m.named_parameters())), Ema(m, 0.5), m)
        for m in (alone, model)
    ]
    for step in range(3):
        for optimizer, average_, m in pairs:
            for number, p in enumerate(m.parameters()):
                grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + number)).double()
                p.grad = torch.zeros_like(p)
                fill(p.grad, grad)
            optimizer.step()
            if not (plant and m is model):
                average_.update(m, step)
    (_, one, _), (_, other, _) = pairs
    found = wholes(dict(model.named_parameters())) | {f"average {n}": t for n, t in wholes(other.averages).items()}
    expected = dict(alone.named_parameters()) | {f"average {n}": t for n, t in one.averages.items()}
    return max(float((found[name] - t).abs().max()) for name, t in expected.items())


def cut_unevenly(job: Job) -> set[str]:
    """What kinds of parts a layout has, over all ranks."""
    state, _ = build(job, 1)
    found = set()
    for p in state.model.parameters():
        box, mine, entire = local_box(p), local(p), p.full_tensor() if isinstance(p, DTensor) else p
        parts = [tuple(sizes) for sizes in exchange(box.sizes)]
        found |= {"empty"} if any(0 in sizes for sizes in parts) else set()
        if any(isinstance(placement, _StridedShard) for placement in p.placements):
            found |= {"strided, uneven"} if len(set(parts)) > 1 else {"strided"}
        assert tuple(mine.shape) == box.sizes
        own = entire[box.within(Box((0,) * p.ndim, tuple(p.shape)))]
        assert not mine.numel() or torch.equal(mine, own)
    return found


def late_save(job: Job) -> tuple[str, str]:
    """Rank 1 hangs while it writes."""
    state, mesh = build(job, 1)
    train(state, mesh, job, 1)
    state.saver = Saver(background=True, timeout_s=0.5)
    go = threading.Event()

    def hang(*_: Any) -> None:
        go.wait(30)
        raise OSError(errno.EIO, "too late")

    with patch.object(async_save, "write", hang) if dist.get_rank() == 1 else nullcontext():
        first = outcome(lambda: state.save(job.folder, {}, keep=3))
        second = outcome(state.finish)
    go.set()
    return first, second


def gathered_average_planted(job: Job) -> bool:
    """The same where a forward pass without gradient keeps what it gathered."""
    with patch.object(Zero, "settle", lambda self: None):
        return gathered_average(job)
