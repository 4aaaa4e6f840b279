"""Counting: every collective, by both interfaces, forward and backward, against what the table in the module says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from dit_case import EVEN, TINY, Case, batch, loss, on_meta, value
from torch.distributed.device_mesh import init_device_mesh
from zero_case import Train, build
from zero_case import on_ranks as trained

from benchmarks.rank_pool import Pool
from parallel import traffic
from parallel.collectives import enter_tensor, exchange, gather, group_name, leave_tensor, split
from parallel.dtensor import fill
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.telemetry import Communication, count_communication
from parallel.tensor import apply_tensor
from parallel.zero import apply_zero
from vidit.model.plan import sharding_plan

WORLD = 4


def c10d(group: Any, rank: int) -> None:
    """Each collective of torch.distributed once; 24 fp32 a rank, 96 bytes."""
    x, parts = torch.ones(24), [torch.ones(6) for _ in range(WORLD)]
    dist.all_reduce(x, group=group)
    dist.all_reduce(x, group=group, async_op=True).wait()
    dist.all_gather([torch.empty(24) for _ in range(WORLD)], x, group=group)
    dist.all_gather_into_tensor(torch.empty(96), x, group=group)
    dist.reduce_scatter_tensor(torch.empty(6), x, group=group)
    dist.reduce_scatter(torch.empty(6), parts, group=group)
    dist.all_to_all_single(torch.empty(24), x, group=group)
    dist.broadcast(x, 0, group=group)
    dist.barrier(group=group)
    if rank < 2:
        dist.send(x, 1, group=group) if rank == 0 else dist.recv(x, 0, group=group)
        sent = dist.P2POp(dist.isend, x, 1 - rank, group)
        for work in dist.batch_isend_irecv([sent, dist.P2POp(dist.irecv, torch.empty(24), 1 - rank, group)]):
            work.wait()


def uneven(group: Any, rank: int) -> None:
    """Rank r gets r + 1 of 10 rows, of 8 bytes."""
    rows = [1, 2, 3, 4]
    out = torch.empty(4 * (rank + 1), 2)
    dist.all_to_all_single(out, torch.ones(10, 2), [rank + 1] * 4, rows, group=group)


def functionals(group: Any, rank: int) -> None:
    x = torch.ones(24)
    functional.all_reduce(x, "sum", group).sum()
    functional.all_gather_tensor(x, 0, group).sum()
    functional.reduce_scatter_tensor(x, "sum", 0, group).sum()
    functional.all_to_all_single(x, None, None, group).sum()


def with_gradients(mesh: Any) -> None:
    """Ours: one collective forward and one backward each, enter and leave half of that."""
    x = torch.ones(8, 3, requires_grad=True)
    name = group_name(mesh)
    exchange(x, mesh).sum().backward()
    gather(x, 0, mesh).sum().backward()
    split(x, 0, mesh).sum().backward()
    enter_tensor(leave_tensor(x, name), name).sum().backward()


def collectives(_: None) -> dict[str, dict[str, Any]]:
    mesh, rank = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("x",)), dist.get_rank()
    other = dist.new_group([0, 1])
    group, told = mesh.get_group(), {}
    for name, run in {"c10d": c10d, "functional": functionals, "uneven": uneven}.items():
        with count_communication({"x": mesh}) as counted:
            run(group, rank)
        told[name] = counted.as_dict()
    with count_communication({"x": mesh}) as counted:
        with_gradients(mesh)
        if rank < 2:
            dist.all_reduce(torch.ones(2), group=other)
    told["ours"] = counted.as_dict()
    with count_communication({"x": mesh}) as counted:
        pass
    dist.all_reduce(torch.ones(2), group=group)
    told["outside"] = counted.as_dict()
    json.dumps(told)
    return told


def test_every_collective(pool: Pool) -> None:
    for rank, told in enumerate(pool.run(WORLD, collectives, None)):
        kinds = {kind: (n["forward"]["calls"], n["forward"]["bytes"]) for kind, n in told["c10d"]["x"].items()}
        assert {kind: kinds[kind] for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")} == {
            "all_reduce": (2, 288), "all_gather": (2, 576), "reduce_scatter": (2, 144), "all_to_all": (1, 72),
        }  # fmt: skip
        assert kinds["broadcast"] == (1, 72)
        assert kinds["barrier"] == (1, 0)
        if rank < 2:
            assert kinds["send"] == ((2, 192) if rank == 0 else (1, 96))
            assert kinds["recv"] == ((1, 0) if rank == 0 else (2, 0))
        kinds = {kind: (n["forward"]["calls"], n["forward"]["bytes"]) for kind, n in told["functional"]["x"].items()}
        assert kinds == {
            "all_reduce": (1, 144), "all_gather": (1, 288), "reduce_scatter": (1, 72), "all_to_all": (1, 72),
        }  # fmt: skip
        assert told["uneven"]["x"]["all_to_all"]["forward"]["bytes"] == 8 * (10 - (rank + 1))
        assert told["outside"] == {}


def test_forward_and_backward(pool: Pool) -> None:
    for rank, told in enumerate(pool.run(WORLD, collectives, None)):
        ours = told["ours"]["x"]
        assert ours["all_to_all"] == {phase: {"calls": 1, "bytes": 72} for phase in ("forward", "backward")}
        assert ours["all_gather"] == {
            "forward": {"calls": 1, "bytes": 288}, "backward": {"calls": 1, "bytes": 72},
        }  # fmt: skip
        assert ours["reduce_scatter"] == {"backward": {"calls": 1, "bytes": 288}}
        assert ours["all_reduce"] == {phase: {"calls": 1, "bytes": 144} for phase in ("forward", "backward")}
        assert ("ranks 0 1" in told["ours"]) == (rank < 2)


def shapes(train: Train) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Of the parameters in units that repeat, and of the others."""
    named = dict(build(train.case).named_parameters())
    inside = [n for n in named if n.startswith(("dit.blocks.", "text.layers."))]
    return [tuple(named[n].shape) for n in inside], [tuple(p.shape) for n, p in named.items() if n not in inside]


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_zero_sends_its_formula(pool: Pool, level: int) -> None:
    """With two micro-batches, odd shapes and a first pass without gradient, which on levels 1 and 2 costs nothing."""
    train = Train({"shard": 2}, level, accumulation=2, steps=1)
    sent = pool.run(2, trained, train)[1].sent["zero"]
    total = sum(phase["bytes"] for kind in sent.values() for phase in kind.values())
    blocks, rest = shapes(train)
    expected = traffic.zero_bytes(blocks, rest, 2, level, train.accumulation, 8)
    if level == 3:  # the first pass of the denoiser gathers its blocks once more
        dit = traffic.zero_bytes(blocks[:-2], [], 2, 3, train.accumulation, 8)
        dit -= traffic.zero_bytes(blocks[:-2], [], 2, 2, train.accumulation, 8)
        expected += dit
    assert total == pytest.approx(expected, rel=1e-3)


def tensor_step(_: None) -> dict[str, Any]:
    """A step of the DiT on tensor and ZeRO ranks; the two are told apart."""
    case = Case({"shard": 2, "tensor": 2}, {"cross_attention": "none"}, EVEN)
    mesh, plan, model = build_mesh(Layout(**case.layout), "cpu"), sharding_plan(case.config), on_meta(case)
    apply_tensor(model, plan.parameters, plan.regions, mesh.tensor, case.config.num_heads)
    apply_zero(model, [plan.blocks], mesh.zero)
    model.to_empty(device="cpu")
    for name, p in model.named_parameters():
        fill(p, value(name, tuple(p.shape)))
    with count_communication(mesh) as counted:
        loss(model, batch(case))[0].backward()
    return counted.as_dict()


def test_axes_are_told_apart(pool: Pool) -> None:
    told = pool.run(4, tensor_step, None)[0]
    assert set(told) == {"zero", "tensor"}
    assert set(told["zero"]) == {"all_gather", "reduce_scatter"}
    sent = sum(phase["bytes"] for phase in told["tensor"]["all_reduce"].values())
    head_dim = TINY["width"] // TINY["num_heads"]
    block = traffic.tensor_bytes(4, 32, TINY["width"], 8, 2, regions=2, per_head=2 * head_dim)
    assert sent == TINY["num_layers"] * block


def test_sums_of_what_is_not_given() -> None:
    counted = Communication()
    counted.add("tensor", "all_reduce", "forward", 10)
    counted.add("tensor", "all_reduce", "backward", 20)
    counted.add("zero", "all_gather", "forward", 5.4)
    assert counted.bytes() == 35.4
    assert counted.bytes("tensor") == 30
    assert counted.bytes(kind="all_gather") == 5.4
    assert counted.calls(phase="forward") == 2
    assert counted.as_dict()["zero"] == {"all_gather": {"forward": {"calls": 1, "bytes": 5}}}


def test_formulas() -> None:
    """By hand: 2 rows of 5 tokens of width 8 in 4 bytes on 4 ranks; a share is 2 tokens, of 128 bytes."""
    assert traffic.ulysses_bytes(2, 5, 8, 4, 4) == 8 * 0.75 * 128
    assert traffic.ring_bytes(2, 5, 8, 4, 4, 4) == (3 + 3 + 4) * 256
    assert traffic.window_bytes(2, 3, 1, 8, 4) == 4 * 64
    assert traffic.tensor_bytes(2, 5, 8, 4, 4, 2) == 4 * 1.5 * 320
    assert traffic.tensor_bytes(2, 5, 8, 4, 4, 0, 7, 3) == 1.5 * 40
    assert traffic.sharded_norms_bytes(2, 5, 8, 4, 4, 2) == 8 * 3 * 128 + 1.5 * 6 * 2 * 8 * 4
    blocks, rest = [(6, 2)], [(3,)]  # shards of 2 x 2 and 1
    assert traffic.zero_bytes(blocks, rest, 4, 0, 3, 4) == 1.5 * (13 + 4) * 4
    assert traffic.zero_bytes(blocks, rest, 4, 1, 3, 4) == 3 * 5 * 4 + 3 * 5 * 4
    assert traffic.zero_bytes(blocks, rest, 4, 2, 3, 4) == 3 * (3 * 5 * 4 + 3 * 5 * 4)
    assert traffic.zero_bytes(blocks, rest, 4, 3, 3, 4, 2) == 3 * (3 * 9 * 4 + 3 * 5 * 2)
