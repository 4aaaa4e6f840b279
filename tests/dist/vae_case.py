"""The real VAE with its work divided: latents, pixels, gradients of every parameter and input, on ranks and in one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from parallel import context, halo
from parallel.context import apply_context
from vidit import keys
from vidit.config import Vae
from vidit.train.parallelize import recompute
from vidit.vae.autoencoder import CausalVae
from vidit.vae.layers import ResBlock
from vidit.vae.plan import context_plan

TINY: dict[str, Any] = {
    "latent_channels": 2, "patch": 2, "base_channels": 4, "multipliers": (1, 2, 2), "num_res_blocks": (0, 1, 1),
    "decoder_res_blocks": (1, 1, 1), "spatial_down": (True, False), "temporal_down": (True, True),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One VAE, one video, ranks in (time, rows). `images`: a video of one frame goes through in between."""

    time: int
    frames: int = 17
    rows: int = 1
    vae: dict[str, Any] = field(default_factory=dict)
    height: int = 8
    images: bool = False
    checkpoint: bool = False
    compile: str = ""
    dtype: torch.dtype = torch.float64
    plant: str = ""

    @property
    def world(self) -> int:
        return self.time * self.rows

    @property
    def config(self) -> Vae:
        return Vae(**{**TINY, **self.vae})


@dataclass
class Result:
    """Outputs, gradients of inputs and parameters, names of the state dict."""

    out: dict[str, Tensor]
    grads: dict[str, Tensor]
    names: list[str]


def build(case: Case) -> CausalVae:
    """Every parameter by its name, so that no path is closed by a zero."""
    vae = CausalVae(case.config).to(case.dtype)
    vae.dtype = case.dtype
    with torch.no_grad():
        for name, p in vae.named_parameters():
            noise = torch.from_numpy(keys.generator(1, "value", name).standard_normal(tuple(p.shape), np.float64))
            p.copy_(1 + 0.2 * noise if "norm" in name else noise / max(3, p[0].numel()) ** 0.5)
    return vae


def video(case: Case, frames: int, seed: int) -> Tensor:
    shape = (2, 3, frames, case.height, 4 * case.config.spatial_stride)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(case.dtype)


def terms(vae: CausalVae, x: Tensor, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss that weighs every output number differently."""
    q = vae.encode(x)
    out = {"mean": q.mean, "log_variance": q.log_variance, "pixels": vae.decode(q.mean + 0.1 * q.log_variance)}
    place = {k: torch.linspace(0, 9, v.numel(), dtype=v.dtype).view_as(v).sin() for k, v in out.items()}
    total = torch.stack([((v - place[k]).square() * (1.5 + place[k])).mean() for k, v in out.items()]).sum()
    return total, {f"{name}.{k}": v.detach() for k, v in out.items()}


def run(case: Case, vae: CausalVae) -> Result:
    clip = video(case, case.frames, 2).requires_grad_()
    total, out = terms(vae, clip, "clip")
    inputs = {"clip": clip}
    if case.images:
        inputs["image"] = video(case, 1, 3).requires_grad_()
        loss, more = terms(vae, inputs["image"], "image")
        total, out = total + loss, out | more
    total.backward()
    grads = {name: _grad(p) for name, p in (*vae.named_parameters(), *inputs.items())}
    return Result(out, grads, list(vae.state_dict()))


def _grad(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def single(case: Case) -> Result:
    """In one process, without anything of `parallel`."""
    return run(case, build(case))


def on_ranks(case: Case) -> Result:
    """On this rank, in the order of `vidit/train/parallelize.py`; parameter gradients are averaged over all ranks."""
    with planted(case.plant):
        mesh = init_device_mesh("cpu", (case.time, case.rows), mesh_dim_names=("time", "rows"))
        vae, plan = build(case), context_plan(case.config)
        if case.time > 1:
            apply_context(vae, plan, mesh["time"])
        if case.rows > 1:
            apply_context(vae, plan, mesh["rows"], "rows")
        for module in vae.modules():
            if isinstance(module, ResBlock):
                if case.checkpoint:
                    recompute(module)
                if case.compile:
                    module.compile(fullgraph=True, backend=case.compile)
        result = run(case, vae)
        for name, _ in vae.named_parameters():
            dist.all_reduce(result.grads[name])
            result.grads[name] /= case.world
        return result


def errors(reference: Result, results: list[Result]) -> dict[str, float]:
    """Largest relative errors on any rank. Gradients below 1e-6 of the largest count as that."""
    worst = {"forward": 0.0, "gradient": 0.0}
    floor = 1e-6 * max(float(g.norm()) for g in reference.grads.values())
    for r in results:
        assert r.out.keys() == reference.out.keys()
        assert r.grads.keys() == reference.grads.keys()
        for name, x in reference.out.items():
            assert r.out[name].dtype == x.dtype
            worst["forward"] = max(worst["forward"], float((r.out[name] - x).norm() / x.norm()))
        for name, g in reference.grads.items():
            error = float((r.grads[name] - g).norm()) / max(floor, float(g.norm()))
            worst["gradient"] = max(worst["gradient"], error)
    return worst


def _not_sent_back(ctx: Any, front: Tensor, back: Tensor) -> tuple[Any, ...]:
    return *(torch.zeros_like(x) for x in right_swap(front, back, ctx.counts, ctx.line)), None, None


def _one_frame_off(x: Tensor, dim: int, before: int, after: int, mesh: Any) -> halo.Edges:
    """The frames before the last one, where there are as many."""
    before_it = before + (dim == 2 and x.shape[dim] > before)
    edges = right_halo(x, dim, before_it, after, mesh)
    return edges._replace(front=edges.front[:, :, :before])


def _repeats(front: context._Front, x: Tensor) -> Tensor:
    """Every part starts like a video: later ones repeat their own first frame in place of what they receive."""
    out = right_front(front, x)
    received = x.shape[2] > 1 and front.mesh.get_local_rank() > 0
    return x[:, :, :1].expand_as(out) + 0 * out if received else out


def _up_drops(drop: context._Drop, x: Tensor) -> Tensor:
    """A frame is dropped on every rank, and the length made up behind."""
    out = right_drop(drop, x)
    return out if out is not x else torch.cat((x[:, :, drop.count :], x[:, :, x.shape[2] - drop.count :]), dim=2)


def _unscaled(x: Tensor, dim: int, mesh: Any) -> Tensor:
    """The gradient that `split` gives back is n times too large."""
    return right_split(x, dim, mesh) if not x.requires_grad else _Times.apply(right_split(x, dim, mesh), mesh.size())


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int) -> Tensor:
        ctx.n = n
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.n, None


def _rows_of_zeros(hook: context._Rows, module: Any, args: tuple[Any, ...]) -> Tensor:
    """Every part is padded as if it were a picture."""
    return torch.nn.functional.pad(args[0], (0, 0, hook.before, hook.after))


right_swap, right_halo, right_split = halo._swap, halo.halo, context.split
right_front, right_drop = context._Front.forward, context._Drop.forward
PLANTS: dict[str, tuple[Any, str, Any]] = {
    "halo one frame off": (context, "halo", _one_frame_off),
    "repeats on later ranks": (context._Front, "forward", _repeats),
    "up drops on later ranks": (context._Drop, "forward", _up_drops),
    "halo's gradient not sent back": (halo._Swap, "backward", staticmethod(_not_sent_back)),
    "split gradient not averaged": (context, "split", _unscaled),
    "rows padded inside the picture": (context._Rows, "__call__", _rows_of_zeros),
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    with ExitStack() as stack:
        if name:
            owner, attribute, bug = PLANTS[name]
            stack.enter_context(patch.object(owner, attribute, bug))
        yield
