"""ZeRO levels and replicas: gradients, their norm and three AdamW steps equal one process, micro-batches included."""

from __future__ import annotations

import functools
import gc
import weakref
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from dit_case import value, wholes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from zero_case import PLANTS, Outcome, Train, errors, on_ranks, single

from benchmarks.rank_pool import Pool
from parallel.gradients import gradient_norm
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.replicas import Replicas, buckets
from parallel.telemetry import count_communication
from parallel.zero import apply_zero, zero_micro_batch

LAYOUTS: dict[str, dict[str, int]] = {
    "dp2": {"shard": 2},
    "2x2": {"replicate": 2, "sequence": 2},
    "tp2": {"shard": 2, "tensor": 2},
    "sp2": {"sequence": 2},
}


@functools.cache
def reference(accumulation: int, steps: int) -> Outcome:
    return single(Train({}, 3, accumulation, steps))


def run(pool: Pool, case: Train) -> list[Outcome]:
    outcomes: list[Outcome] = pool.run(Layout(**case.layout).world, on_ranks, case)
    return outcomes


def measured(pool: Pool, case: Train) -> dict[str, float]:
    return errors(run(pool, case)[0], reference(case.accumulation, case.steps))


def assert_equal(found: dict[str, float]) -> None:
    assert found["gradient"] <= 1e-11, found
    assert found["norm"] <= 1e-12, found
    assert found["parameter"] <= 1e-10, found
    assert found["validation"] <= 1e-11, found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_levels(pool: Pool, layout: str, level: int) -> None:
    case = Train(LAYOUTS[layout], level, checkpoint=layout == "sp2")
    outcome = run(pool, case)[0]
    assert_equal(errors(outcome, reference(case.accumulation, case.steps)))
    assert outcome.shards == (level > 0), "after a validation names stand for shards"


def test_without_overlap(pool: Pool) -> None:
    """Averaging at the end of the step, as around a pipeline schedule, is the same."""
    assert_equal(measured(pool, Train(LAYOUTS["2x2"], 0, overlap=False)))


@pytest.mark.parametrize("level", [0, 1, 3])
def test_gradients_travel_in_the_dtype_that_is_asked_for(pool: Pool, level: int) -> None:
    """bf16 has 8 bits: an error between none and a hundredth, for a quarter of the bytes of fp64."""
    case = Train(LAYOUTS["dp2"], level, accumulation=1, steps=1, reduce_dtype=torch.bfloat16)
    narrow = run(pool, case)[0]
    wide = run(pool, replace(case, reduce_dtype=None))[0]
    found = errors(narrow, reference(1, 1))
    assert 1e-4 < found["gradient"] < 1e-2, found
    kind = "reduce_scatter" if level else "all_reduce"
    sent = [outcome.sent["zero"][kind]["backward"]["bytes"] for outcome in (narrow, wide)]
    assert sent[0] == pytest.approx(sent[1] / 4, rel=1e-3)


# What each planted bug spoils, and the layout and level that must see it.
CAUGHT: dict[str, tuple[str, int, str]] = {
    "replicas not averaged": ("dp2", 0, "gradient"),
    "accumulated gradient summed twice": ("dp2", 0, "gradient"),
    "level 1 never sums": ("dp2", 1, "keys"),
    "replicas of shards not summed": ("2x2", 3, "keys"),
    "weights stay gathered": ("dp2", 2, "names"),
}


def test_every_plant_is_tried() -> None:
    assert CAUGHT.keys() == PLANTS.keys()


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_bugs_are_seen(pool: Pool, plant: str) -> None:
    layout, level, spoiled = CAUGHT[plant]
    outcome = run(pool, Train(LAYOUTS[layout], level, plant=plant))[0]
    expected = reference(2, 3)
    if spoiled == "keys":
        assert outcome.grads.keys() < expected.grads.keys()
    elif spoiled == "names":
        assert not outcome.shards, "a validation left whole weights under the names"
    else:
        found = errors(outcome, expected)
        assert found[spoiled] > 1e-3, found
        with pytest.raises(AssertionError):
            assert_equal(found)


class Coder(nn.Module):
    """Called by methods, as an autoencoder is; `spare` is used by rank 1 alone, `never` by none."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.into, self.spare, self.never = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def encode(self, x: Tensor) -> Tensor:
        return self.blocks[0](self.into(x)).tanh()

    def decode(self, x: Tensor) -> Tensor:
        return self.blocks[2](self.blocks[1](x)).tanh()


def coder(device: str = "cpu") -> Coder:
    made = Coder().to(device).double()
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(value(name, tuple(p.shape)))
    return made


def called_by_methods(level: Any) -> tuple[dict[str, Tensor], bool]:
    model = nn.ModuleDict({"vae": coder()})
    mesh = build_mesh(Layout(shard=2), "cpu")
    apply_zero(model, ["vae.blocks.*"], mesh.zero, level=level, methods=("encode", "decode"))
    x = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)[dist.get_rank()]
    vae: Any = model["vae"]
    for last in (False, True):
        with zero_micro_batch(model, last):
            (vae.decode(vae.encode(x)).square().sum() / 2).backward()
    grads = wholes({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    with torch.no_grad():
        vae.encode(x)
    return grads, all(isinstance(p, DTensor) for p in model.parameters())


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_methods_in_place_of_forward(pool: Pool, level: int) -> None:
    model = nn.ModuleDict({"vae": coder()})
    vae: Any = model["vae"]
    x = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    (vae.decode(vae.encode(x)).square().sum() / 2).backward()
    for grads, shards in pool.run(2, called_by_methods, level):
        assert shards == (level > 0)
        assert grads.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
        for name, grad in grads.items():
            assert torch.allclose(grad, model.get_parameter(name).grad, rtol=1e-12, atol=0)  # type: ignore[arg-type]


def in_buckets(_: None) -> dict[str, Any]:
    """Small buckets, a parameter that one rank uses and one that none does, backward passes outside of the context."""
    model, mesh, rank = coder(), build_mesh(Layout(replicate=2, shard=2), "cpu"), dist.get_rank()
    replicas = Replicas(model, [model], mesh.zero, None, bucket_bytes=100)
    replicas.prepare()
    order: list[str] = []
    all_reduce = dist.all_reduce

    def noted(*args: Any, **kwargs: Any) -> Any:
        order.append("sent")
        return all_reduce(*args, **kwargs)

    with patch.object(dist, "all_reduce", noted):
        for _ in range(2):
            x = torch.full((3,), rank + 1.0, dtype=torch.float64)
            y = model.decode(model.encode(x))
            (y + model.spare(x) if rank == 1 else y).square().sum().backward()
    return {
        "order": order, "buckets": len(replicas.prepare()), "never": model.never.weight.grad,
        "grads": {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
    }  # fmt: skip


def test_buckets(pool: Pool) -> None:
    """Sent in one order on all ranks while backward runs; who has no gradient gets one where another rank has."""
    model, answers = coder(), pool.run(4, in_buckets, None)
    for rank in range(4):
        x = torch.full((3,), rank + 1.0, dtype=torch.float64)
        y = model.decode(model.encode(x))
        for _ in range(2):
            total = (y + model.spare(x) if rank == 1 else y).square().sum() / 4
            total.backward(retain_graph=True)
    for answer in answers:
        assert answer["never"] is None
        assert answer["order"].count("sent") == 2 * answer["buckets"]
        for name, grad in answer["grads"].items():
            assert torch.allclose(grad, model.get_parameter(name).grad, rtol=1e-12, atol=0), name  # type: ignore[arg-type]
        assert len(answer["grads"]) == len(list(model.parameters())) - 2


def test_buckets_are_sent_during_backward(pool: Pool) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    made = buckets(list(model.parameters()), 50)
    assert [[tuple(p.shape) for p in b.parameters] for b in made] == 4 * [[(3,), (3, 3)]]
    order = pool.run(2, overlapping, None)[0]
    assert order.index("sent") < order.index("end of backward"), order


def overlapping(_: None) -> list[str]:
    model, order = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4))), []
    replicas = Replicas(model, [model], build_mesh(Layout(shard=2), "cpu").zero, None, bucket_bytes=50)
    model[0].weight.register_hook(lambda grad: order.append("end of backward"))
    send = replicas._send
    with patch.object(replicas, "_send", lambda bucket: (order.append("sent"), send(bucket))):
        model(torch.ones(3)).sum().backward()
    return order


def refused(arguments: dict[str, Any]) -> str:
    try:
        apply_zero(nn.Sequential(nn.Linear(2, 2)), ["0"], build_mesh(Layout(shard=2), "cpu").zero, **arguments)
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "accepted"),
        ({"level": 4}, "parallel.zero=4 is no level; use 0 (replicas), 1, 2 or 3"),
        ({"level": 0, "cpu_offload": True}, "parallel.cpu_offload has no effect with parallel.zero=0"),
        ({"cpu_offload": True}, "parallel.cpu_offload has no effect on a CPU"),
    ],
)
def test_options_without_effect(pool: Pool, arguments: dict[str, Any], message: str) -> None:
    assert all(message in said for said in pool.run(2, refused, arguments))


def norms(_: None) -> dict[str, Any]:
    """A module under tensor and ZeRO ranks beside one under ZeRO alone, on two stages: all-reduces and the norm."""
    mesh = build_mesh(Layout(pipeline=2, shard=2), "cpu")
    rank = mesh.pipeline.get_local_rank()
    own, alike = nn.Linear(5, 3).double(), nn.Linear(2, 2).double()
    model = nn.ModuleList([own, alike])
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(value(n if n.startswith("1") else f"{rank}{n}", tuple(p.shape)))
    apply_zero(nn.Sequential(own), ["0"], mesh.zero)
    for p in model.parameters():
        p.grad = p.detach().clone()
    with count_communication(mesh) as counted:
        norm = gradient_norm(model.parameters(), mesh.pipeline, list(alike.parameters()))
    return {"norm": float(norm), "calls": counted.calls()}


def test_norm_over_stages(pool: Pool) -> None:
    """Each stage's own parameters count, what all stages hold counts once; one all-reduce a process group."""
    squares = sum(float(value(n, s).square().sum()) for n, s in (("1.weight", (2, 2)), ("1.bias", (2,))))
    for rank in range(2):
        squares += sum(float(value(f"{rank}0.{n}", s).square().sum()) for n, s in (("weight", (3, 5)), ("bias", (3,))))
    for answer in pool.run(4, norms, None):
        assert answer["norm"] == pytest.approx(squares**0.5, rel=1e-13)
        assert answer["calls"] == 2


def replicas_are_left(_: None) -> bool:
    """Whether what averages gradients outlives its module."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("replicate",))
    module = nn.Linear(2, 2)
    replicas = Replicas(module, [module], mesh, None)
    module(torch.ones(1, 2)).sum().backward()
    kept = weakref.ref(replicas)
    del replicas, module, mesh
    gc.collect()
    return kept() is not None


def test_nothing_is_left_of_replicas(pool: Pool) -> None:
    """With them would stay a process group, whose threads wake for ever."""
    assert pool.run(2, replicas_are_left, None) == [False, False]
