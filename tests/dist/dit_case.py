"""The real DiT on any layout, in fp64: outputs and the gradient of every parameter, on ranks and in one process."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel import collectives, sequence, tensor, ulysses
from parallel.dtensor import Box, fill, local, local_box
from parallel.gradients import gradient_norm
from parallel.kinds import SequenceKind
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.sequence import apply_sequence
from parallel.tensor import apply_tensor
from parallel.ulysses import UlyssesCore
from parallel.zero import apply_zero
from vidit import keys
from vidit.config import Model
from vidit.model.context import EVERY_FRAME, PADDING, TextContext
from vidit.model.dit import DiT
from vidit.model.plan import sharding_plan
from vidit.model.windows import Grid
from vidit.train.parallelize import recompute

CHANNELS, TEXT, TOKENS = 3, 10, 6
SECOND, MORE = 8, 7  # of a second encoder
OF_GRID = ("image_B", "still_B", "given_BCTHW")
TINY: dict[str, Any] = {
    "num_layers": 3, "width": 48, "num_heads": 4, "mlp_width": 64, "windows": ((1, 0, 0), (0, 2, 2)),
    "pooled_text": True, "attention_backend": "sdpa",
}  # fmt: skip
ODD, EVEN = (3, 5, 3), (2, 4, 4)  # 45 and 32 tokens; windows of 2 x 2 do not divide the first


@dataclass(frozen=True)
class Case:
    """One model, one batch, one layout. `compile` is a backend, `plant` a bug of PLANTS, `ulysses` a degree."""

    layout: dict[str, int]
    model: dict[str, Any] = field(default_factory=dict)
    grid: tuple[int, int, int] = ODD
    images: bool = False
    zero: bool = True
    level: int = 3
    checkpoint: bool = False
    compile: str = ""
    plant: str = ""
    kind: SequenceKind = "ulysses"
    ulysses: int = 0

    @property
    def config(self) -> Model:
        return Model(**{**TINY, **self.model})


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    """A full parameter, fp64; no path is closed by a zero."""
    noise = torch.from_numpy(keys.generator(1, "value", name).standard_normal(shape, np.float64))
    return 1 + 0.2 * noise if "norm" in name else noise / max(3, shape[-1]) ** 0.5


def batch(case: Case) -> dict[str, Tensor | None]:
    """Four rows, half of them images where the case has any."""
    g = torch.Generator().manual_seed(2)
    rows, frames = 4, case.grid[0]
    frame = torch.full((rows, TOKENS), EVERY_FRAME)
    frame[0, -2:] = PADDING
    image_B = None
    if case.images:
        image_B = torch.tensor([False, True, False, True])
        frame[image_B] = torch.arange(TOKENS) % frames
        frame[1, -1] = PADDING
    shape = (rows, CHANNELS, *case.grid)
    two = case.config.cross_text == "interleaved"
    more: dict[str, Tensor | None] = {}
    if two:
        other = torch.Generator().manual_seed(4)
        more["second_BLE"] = torch.randn(rows, MORE, SECOND, generator=other, dtype=torch.float64)
        more["second_frame_BL"] = torch.cat((frame, frame[:, :1]), dim=1)
    given = torch.randn(rows, CHANNELS + 1, *case.grid, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return {
        "x_BCTHW": torch.randn(shape, generator=g, dtype=torch.float64),
        "time_B": torch.rand(rows, *[frames] * case.config.frame_times, generator=g, dtype=torch.float64) * 1000,
        "text_BLE": torch.randn(rows, TOKENS, TEXT, generator=g, dtype=torch.float64),
        "text_frame_BL": frame,
        "pooled_BE": torch.randn(rows, SECOND if two else TEXT, generator=g, dtype=torch.float64),
        "image_B": image_B,
        "given_BCTHW": given if case.config.given_channels else None,
        "still_B": torch.tensor([True, False, False, False]) if case.config.motion_free else None,
        "previous_BCTHW": torch.randn(shape, generator=g, dtype=torch.float64),
        "target": torch.randn(shape, generator=g, dtype=torch.float64),
        **more,
    }


def on_meta(case: Case) -> DiT:
    with torch.device("meta"):
        second = SECOND if case.config.cross_text == "interleaved" else 0
        model = DiT(case.config, CHANNELS, case.grid, TEXT, second).double()
    model.dtype = torch.float64
    return model


def grid_of(x: Tensor, inputs: dict[str, Tensor | None]) -> Grid:
    """The grid of a latent, with what of the inputs belongs to it, which is taken out of them."""
    return Grid(*x.shape[2:], **{name: inputs.pop(name) for name in OF_GRID})


def loss(model: DiT, rows: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    """(mean over the rows, output)."""
    inputs = dict(rows)
    target, x = inputs.pop("target"), inputs.pop("x_BCTHW")
    second = TextContext(inputs.pop("second_BLE"), inputs.pop("second_frame_BL")) if "second_BLE" in inputs else None
    out = model(x, grid_of(x, inputs), **inputs, second=second)
    return ((out - target).square() * (1.5 + target.sin())).flatten(1).mean(1).mean(), out


@dataclass
class Result:
    """Output of some rows, loss, gradients of every parameter, their norm."""

    rows: slice
    out: Tensor
    grads: dict[str, Tensor]
    norm: float
    names: list[str]


def single(case: Case) -> Result:
    """In one process, without anything of `parallel`."""
    model = on_meta(case).to_empty(device="cpu")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(value(name, tuple(p.shape)))
    total, out = loss(model, batch(case))
    total.backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    norm = float(torch.stack([g.norm() for g in grads.values()]).norm())
    return Result(slice(None), out.detach(), grads, norm, list(model.state_dict()))


def on_ranks(case: Case) -> Result:
    """On this rank of the layout, in the order of `vidit/train/parallelize.py`."""
    with planted(case.plant):
        layout, c = Layout(**case.layout), case.config
        mesh = build_mesh(layout, "cpu", ulysses=case.ulysses)
        plan, model = sharding_plan(c), on_meta(case)
        if layout.tensor > 1:
            apply_tensor(model, plan.parameters, plan.regions, mesh.tensor, c.num_heads, plan.means)
        if layout.sequence > 1:
            apply_sequence(model, plan, mesh, case.kind)
        for block in model.blocks.values():
            if case.checkpoint:
                recompute(block)
            if case.compile:
                block.compile(fullgraph=True, backend=case.compile)
        if case.zero:
            apply_zero(model, [plan.blocks], mesh.zero, level=case.level)
        model.to_empty(device="cpu")
        for name, p in model.named_parameters():
            fill(p, value(name, tuple(p.shape)))
        size = 4 // layout.data
        rows = slice(mesh.data_rank * size, (mesh.data_rank + 1) * size)
        total, out = loss(model, {k: None if x is None else x[rows] for k, x in batch(case).items()})
        total.backward()
        if not case.zero:
            average(model, mesh.root)
        norm = float(gradient_norm(model.parameters()))
        grads = wholes({name: p if p.grad is None else p.grad for name, p in model.named_parameters()})
        unused = [name for name, p in model.named_parameters() if p.grad is None]
        grads |= {name: torch.zeros_like(grads[name]) for name in unused}
        return Result(rows, out.detach(), grads if dist.get_rank() == 0 else {}, norm, list(model.state_dict()))


def average(model: DiT, root: Any) -> None:
    """What ZeRO does, without it: the mean over data and sequence ranks."""
    for p in model.parameters():
        if p.grad is None:
            continue
        grad = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
        for axis in ("replicate", "zero"):
            dist.all_reduce(grad, group=root.get_group(axis))
        grad /= root["replicate"].size() * root["zero"].size()


def wholes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies, on every rank, by one exchange of all: a gather for each took longer than the rest of a case."""
    own = {name: (local_box(t), local(t).detach().numpy()) for name, t in tensors.items() if isinstance(t, DTensor)}
    held: list[Any] = [own]
    if dist.is_initialized():
        held *= dist.get_world_size()
        dist.all_gather_object(held, own)
    copies = {}
    for name, t in tensors.items():
        if isinstance(t, DTensor):
            copies[name] = full = torch.full(t.shape, torch.nan, dtype=t.dtype)
            for rank in t.device_mesh.mesh.flatten().tolist():
                box, part = held[rank][name]
                full[box.within(Box((0,) * t.ndim, tuple(t.shape)))] = torch.from_numpy(part)
            assert not full.isnan().any(), f"ranks do not hold all of {name}"
        else:
            copies[name] = t.detach().clone()
    return copies


def errors(case: Case, reference: Result, results: list[Result]) -> dict[str, float]:
    """Largest relative errors of outputs, gradients and norm. Gradients below 1e-6 of the largest count as that."""
    worst = {"forward": 0.0, "gradient": 0.0, "norm": 0.0}
    for r in results:
        expected = reference.out[r.rows]
        worst["forward"] = max(worst["forward"], float((r.out - expected).norm() / expected.norm()))
        worst["norm"] = max(worst["norm"], abs(r.norm / reference.norm - 1))
    floor = 1e-6 * max(float(g.norm()) for g in reference.grads.values())
    assert results[0].grads.keys() == reference.grads.keys()
    for name, g in reference.grads.items():
        error = float((results[0].grads[name] - g).norm()) / max(floor, float(g.norm()))
        worst["gradient"] = max(worst["gradient"], error)
    return worst


def _split_without_mean(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return collectives._all_gather(grad, ctx.dim, ctx.size, ctx.group), None, None, None, None


def _identity(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return grad, None


def _every_rank(x: Tensor, first: bool) -> Tensor:
    return x.view_as(x)


def _unsummed(parameter: Any, kind: str, group: str, first: bool) -> Any:
    return parameter.to_local() if kind == "per_head" else right_local(parameter, kind, group, first)


def _padded(core: UlyssesCore, x_3BsNK: Tensor, tokens: int) -> Tensor:
    """Padding takes the place of the last real tokens, as where a core trims at the wrong end."""
    return right_to_heads(core, x_3BsNK, core.size * x_3BsNK.shape[2])[:, :, -tokens:]


def _first_places(hook: sequence._Cut, x: Tensor, dim: int) -> Tensor:
    """Positions (cut in dim 0) start at 0 on every rank."""
    own = sequence.share(x.shape[dim], hook.mesh.size())
    return x.narrow(dim, 0, own).clone() if dim == 0 else right_own(hook, x, dim)


def _averaged(x: Tensor, dim: int, mesh: Any) -> Tensor:
    """Gathered, with the mean of the gradients for their sum."""
    whole = right_gather(x, dim, mesh)
    return whole.detach() * (1 - 1 / mesh.size()) + whole / mesh.size()


def _own_mean(hook: tensor.Averaged, module: Any, args: Any, output: Tensor) -> Tensor:
    return output


def _own_gradient(hook: tensor.Averaged, module: Any, args: Any, output: Tensor) -> Tensor:
    return collectives.leave_tensor(output / hook.size, hook.group)


def _summed(module: DiT, blocks: Any, mesh: Any, level: Any) -> None:
    right_zero(module, blocks, mesh, level=level)
    for unit in (*module.blocks.values(), module):
        unit.set_gradient_divide_factor(1.0)


def _halved(parameters: Any) -> Tensor:
    return right_norm(parameters) / 2


def _replicas_counted(parameters: Any) -> Tensor:
    total = right_norm(parameters).square()
    dist.all_reduce(total)
    return total.sqrt()


right_local, right_to_heads, right_own = tensor._local, UlyssesCore._to_heads, sequence._Cut._own
right_zero, right_norm, right_gather = apply_zero, gradient_norm, collectives.gather
PLANTS: dict[str, tuple[Any, str, Any]] = {
    "split gradient not averaged": (collectives._Split, "backward", staticmethod(_split_without_mean)),
    "region gradient not summed": (collectives._EnterTensor, "backward", staticmethod(_identity)),
    "per-head gradient not summed": (tensor, "_local", _unsummed),
    "row bias counted on every rank": (tensor, "first_only", _every_rank),
    "padding trimmed at the wrong end": (UlyssesCore, "_to_heads", _padded),
    "positions not cut": (sequence._Cut, "_own", _first_places),
    "heads' means not averaged": (tensor.Averaged, "__call__", _own_mean),
    "heads' means not summed backward": (tensor.Averaged, "__call__", _own_gradient),
    "text's heads averaged backward": (ulysses, "gather", _averaged),
    "sequence not averaged": (sys.modules[__name__], "apply_zero", _summed),
    "norm halved": (sys.modules[__name__], "gradient_norm", _halved),
    "replicas counted twice in the norm": (sys.modules[__name__], "gradient_norm", _replicas_counted),
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    with ExitStack() as stack:
        if name:
            owner, attribute, bug = PLANTS[name]
            stack.enter_context(patch.object(owner, attribute, bug))
        yield
