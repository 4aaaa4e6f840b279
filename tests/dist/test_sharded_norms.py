"""Sequence-sharded norms: gradients of every parameter equal one process; what is planted wrong is seen."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import dit_case
import pytest
import torch
import torch.distributed as dist
from dit_case import EVEN, ODD, Case, Result, errors, loss, on_meta, single, value, wholes

from benchmarks.rank_pool import Pool
from parallel import sharded_norms, tensor
from parallel.dtensor import fill
from parallel.gradients import gradient_norm
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.names import PlanError
from parallel.sequence import apply_sequence
from parallel.sharded_norms import apply_sharded_norms
from parallel.tensor import apply_tensor
from parallel.zero import apply_zero
from vidit.config import FAMILIES
from vidit.model.plan import Plan, sharding_plan
from vidit.train.parallelize import recompute

LAYOUTS: dict[str, dict[str, int]] = {
    "tp2": {"tensor": 2},
    "tp4": {"tensor": 4},
    "tp2 sp2": {"sequence": 2, "tensor": 2},
    "zero2 tp2": {"shard": 2, "tensor": 2},
}
MODELS: dict[str, dict[str, Any]] = {
    "bias": {},
    "rope, text keys": {"relative_position": "rope", "cross_keys": "text", "cross_attention": "all"},
    "one block": {"num_layers": 1},
    "wan": {**FAMILIES["wan"], "patch": 1, "pooled_text": False},
    "latte": {**FAMILIES["latte"], "patch": 1, "pooled_text": False},
    "stdit3": {**FAMILIES["stdit3"], "patch": 1, "pooled_text": False},
    "stdit3 frames": {**FAMILIES["stdit3"], "patch": 1, "frame_times": True},
    "opensora_plan": {**FAMILIES["opensora_plan"], "patch": 1, "pooled_text": False},
    "gentron": {**FAMILIES["gentron"], "patch": 1, "motion_free": 0.5, "norm_affine": True},
    "norms with scale and shift": {"norm_affine": True, "qk_norm": "head_affine"},
    "bare": {"cross_attention": "none", "qk_norm": False, "adaln_rank": 0, "relative_position": "none"},
}


def sharded(model: Any, plan: Plan, mesh: Any, **change: Any) -> None:
    seams: dict[str, Any] = {
        "cut": {n: dims for n, dims in plan.split.items() if n not in plan.positions} | plan.placed,
        "vectors": plan.vectors, "regions": plan.regions, "whole": plan.gather,
        "counted": plan.counted, "before": plan.before, "beside": plan.beside,
    }  # fmt: skip
    apply_sharded_norms(model, **(seams | change), mesh=mesh.tensor, sequence=mesh.sequence.size())


def on_ranks(case: Case) -> tuple[Result, dict[str, int]]:
    """On this rank of the layout, and the tokens that each kind of module gets."""
    plant = PLANTS.get(case.plant)
    with patch.object(*plant) if plant else patch.object(dist, "no_plant", None, create=True):
        layout, c = Layout(**case.layout), case.config
        mesh, plan, model = build_mesh(layout, "cpu"), sharding_plan(c), on_meta(case)
        apply_tensor(model, plan.parameters, plan.regions, mesh.tensor, c.num_heads, plan.means)
        if layout.sequence > 1:
            apply_sequence(model, plan, mesh, case.kind)
        sharded(model, plan, mesh)
        tokens: dict[str, int] = {}
        for name in ("blocks.0", "blocks.0.attn.query", "blocks.0.attn.core", "head", "head.project"):
            note = functools.partial(noted, tokens, name)
            model.get_submodule(name).register_forward_pre_hook(note)
        for block in model.blocks.values():
            if case.checkpoint:
                recompute(block)
            if case.compile:
                block.compile(fullgraph=True, backend=case.compile)
        apply_zero(model, [plan.blocks], mesh.zero)
        model.to_empty(device="cpu")
        for name, p in model.named_parameters():
            fill(p, value(name, tuple(p.shape)))
        size = 4 // layout.data
        rows = slice(mesh.data_rank * size, (mesh.data_rank + 1) * size)
        total, out = loss(model, {k: None if x is None else x[rows] for k, x in dit_case.batch(case).items()})
        total.backward()
        norm = float(gradient_norm(model.parameters()))
        grads = wholes({n: p.detach() * 0 if p.grad is None else p.grad for n, p in model.named_parameters()})
        return Result(rows, out.detach(), grads if dist.get_rank() == 0 else {}, norm, list(model.state_dict())), tokens


def noted(tokens: dict[str, int], name: str, module: Any, args: Any) -> None:
    tokens[name] = args[0].shape[1]


@functools.cache
def reference(grid: tuple[int, int, int], images: bool, model: str) -> Result:
    return single(Case({}, MODELS[model], grid, images))


def measured(pool: Pool, case: Case, model: str = "bias") -> tuple[dict[str, float], dict[str, int]]:
    one = reference(case.grid, case.images, model)
    answers = pool.run(Layout(**case.layout).world, on_ranks, replace(case, model=MODELS[model]))
    assert all(result.names == one.names for result, _ in answers), "names of the state dict"
    return errors(case, one, [result for result, _ in answers]), answers[0][1]


def assert_equal(found: dict[str, float]) -> None:
    assert found["forward"] <= 1e-13, found
    assert found["gradient"] <= 1e-10, found  # 1e-11 is seen where a key bias's is zero but for rounding
    assert found["norm"] <= 1e-12, found


@pytest.mark.parametrize(
    ("grid", "images", "checkpoint"), [(ODD, False, False), (EVEN, True, True)], ids=["odd", "even images checkpoint"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(pool: Pool, layout: str, grid: Any, images: bool, checkpoint: bool) -> None:
    found, tokens = measured(pool, Case(LAYOUTS[layout], {}, grid, images, checkpoint=checkpoint))
    assert_equal(found)
    n, t = LAYOUTS[layout].get("sequence", 1), LAYOUTS[layout]["tensor"]
    whole_row = grid[0] * grid[1] * grid[2]
    held = -(-whole_row // n)
    assert tokens["blocks.0"] == tokens["head"] == tokens["head.project"] == -(-held // t), "1/t between regions"
    assert tokens["blocks.0.attn.query"] == tokens["blocks.0.attn.core"] == held, "no padding in a region"


@pytest.mark.parametrize("model", [m for m in MODELS if m not in ("bias", "one block")])
def test_models(pool: Pool, model: str) -> None:
    assert_equal(measured(pool, Case(LAYOUTS["tp4"], {}, ODD, checkpoint=True), model)[0])


def test_around_a_ring(pool: Pool) -> None:
    assert_equal(measured(pool, Case(LAYOUTS["tp2 sp2"], {}, ODD, kind="ring"))[0])


def test_compiled_blocks(pool: Pool) -> None:
    """Gathering and scattering are part of one graph."""
    assert_equal(measured(pool, Case(LAYOUTS["tp2"], {}, ODD, compile="aot_eager"), "one block")[0])


def _own_gradient(seams: Any, module: Any, args: Any, output: Any) -> Any:
    return output


def _unsummed(module: Any, group: str) -> None:
    return None


def _wrong_end(seams: Any, x: torch.Tensor, args: Any) -> torch.Tensor:
    """Padding takes the place of the last real tokens."""
    gathered = right_gather(seams, x, ())
    return gathered[:, -seams.own_count(args) :] if any(hasattr(a, "num_tokens") for a in args) else gathered


def _own_part(ctx: Any, grad: torch.Tensor) -> Any:
    """Only what this rank's own tokens send back."""
    full = torch.zeros(grad.shape[0], grad.shape[1] * ctx.size, *grad.shape[2:], dtype=grad.dtype)
    full[:, : grad.shape[1]] = grad
    return full, None, None, None


def _vectors_too(c: Any) -> Plan:
    """The vectors of frames are cut like tokens, and summed as if each rank had used its own part of a row's."""
    plan = right_plan(c)
    return replace(plan, vectors=("blocks.*.modulation", "head.modulation"))


right_plan = sharding_plan
right_gather = sharded_norms._Seams.gather
PLANTS: dict[str, tuple[Any, str, Any]] = {
    "vectors not summed": (sharded_norms._Seams, "sum_gradients", _own_gradient),
    "output layer not summed": (sharded_norms, "read_summed", _unsummed),
    "padding trimmed at the wrong end": (sharded_norms._Seams, "gather", _wrong_end),
    "scattered gradient not gathered": (sharded_norms._Scatter, "backward", staticmethod(_own_part)),
    "row bias counted on every rank": (tensor, "first_only", dit_case._every_rank),
    "vectors of frames summed twice": (sys.modules[__name__], "sharding_plan", _vectors_too),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_bugs_are_seen(pool: Pool, plant: str) -> None:
    model = "stdit3 frames" if "frames" in plant else "bias"
    found, _ = measured(pool, Case(LAYOUTS["tp2"], {}, ODD, plant=plant), model)
    assert max(found.values()) > 1e-3, found
    with pytest.raises(AssertionError):
        assert_equal(found)


def refused(change: str) -> str:
    case = Case({"tensor": 2})
    plan, model, mesh = sharding_plan(case.config), on_meta(case), build_mesh(Layout(tensor=2), "cpu")
    if change != "no tensor plan":
        regions = {k: v for k, v in plan.regions.items() if change != "no entrance" or "mlp" not in k}
        apply_tensor(model, plan.parameters, regions, mesh.tensor, case.config.num_heads)
    changes = {"vectors": ("head.modulation",)} if change == "modulation without a rule" else {}
    try:
        sharded(model, plan, mesh, **changes)
    except PlanError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("none", "accepted"),
        ("no tensor plan", "is not divided by a tensor plan; call apply_tensor before"),
        ("no entrance", "mlp has 0 entrances and 1 exits of a tensor region"),
        ("modulation without a rule", "parameter blocks.0.modulation.down.weight is in none of the"),
    ],
)
def test_plans(pool: Pool, change: str, message: str) -> None:
    assert all(message in said for said in pool.run(2, refused, change))
