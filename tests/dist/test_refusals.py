"""What does not divide or does not fit is refused by the module that would divide it, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dit_case import ODD, TINY, Case, on_meta, on_ranks
from torch.distributed.tensor import DTensor

from benchmarks.rank_pool import Pool, TaskError
from parallel.dtensor import fill
from parallel.gradients import clip_gradients, gradient_norm
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.names import PlanError
from parallel.shares import num_tokens, pad_to
from parallel.tensor import apply_tensor
from parallel.zero import apply_zero
from vidit.model.plan import sharding_plan


def divide(change: str) -> str:
    """Apply a plan with one thing wrong to two ranks; the message."""
    case = Case({"tensor": 2})
    plan, model = sharding_plan(case.config), on_meta(case)
    parameters: dict[str, Any] = dict(plan.parameters)
    heads = TINY["num_heads"]
    if change == "heads":
        heads = 5
    elif change == "kind":
        parameters["blocks.*.mlp.up.*"] = "columns"
    elif change == "missing":
        del parameters["blocks.*.mlp.up.*"]
    elif change == "size":
        parameters["blocks.*.modulation.*.*"] = "row"
        model.blocks["0"].modulation.down.weight = torch.nn.Parameter(torch.empty(2, 47, device="meta"))
    try:
        apply_tensor(model, parameters, plan.regions, build_mesh(Layout(tensor=2), "cpu").tensor, heads)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("none", "accepted"),
        ("heads", "ValueError: 5 heads are not divisible by parallel.tensor=2; use one of 1 5"),
        ("kind", "PlanError: parameter blocks.0.mlp.up.weight has kind 'columns'; use one of"),
        ("missing", "PlanError: parameter blocks.0.mlp.up.weight fits none of"),
        ("size", "blocks.0.modulation.down.weight has 47 entries in dim 1, not divisible by parallel.tensor=2"),
    ],
)
def test_plans(pool: Pool, change: str, message: str) -> None:
    said = pool.run(2, divide, change)
    assert said[0] == said[1]
    assert message in said[0]


def test_ulysses_needs_heads(pool: Pool) -> None:
    case = Case({"sequence": 4}, {"num_heads": 6}, ODD)
    with pytest.raises(TaskError) as caught:
        pool.run(4, on_ranks, case)
    assert len(caught.value.failures) == 4
    assert "6 heads on each rank are not divisible by parallel.sequence=4" in str(caught.value)
    assert "use one of 1 2 3 6" in str(caught.value)


def pieces(_: None) -> dict[str, float]:
    """A matrix with odd sides under ZeRO: filling, norm and clipping against the whole."""
    linear = torch.nn.Linear(5, 7, device="meta")
    mesh = build_mesh(Layout(shard=2, replicate=2), "cpu")
    apply_zero(torch.nn.Sequential(linear), ["0"], mesh.zero)
    linear.to_empty(device="cpu")
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(7, 5, generator=g), torch.randn(7, generator=g)
    fill(linear.weight, weight)
    fill(linear.bias, bias)
    assert isinstance(linear.weight, DTensor)
    assert isinstance(linear.bias, DTensor)
    pairs = ((linear.weight, weight), (linear.bias, bias))
    errors = {"fill": sum(float((p.full_tensor() - full).abs().max()) for p, full in pairs)}
    for p in linear.parameters():
        p.grad = p.detach().clone()
    expected = float(torch.cat((weight.flatten(), bias)).norm())
    norm = gradient_norm(linear.parameters())
    errors["norm"] = abs(float(norm) / expected - 1)
    clip_gradients(linear.parameters(), 0.5, norm)
    errors["clipped"] = abs(float(gradient_norm(linear.parameters())) / 0.5 - 1)
    before = linear.weight.grad.full_tensor()
    clip_gradients(linear.parameters(), 1.0, gradient_norm(linear.parameters()))
    errors["below the limit"] = float((linear.weight.grad.full_tensor() - before).abs().max())
    return errors


def test_pieces_of_a_matrix(pool: Pool) -> None:
    for errors in pool.run(4, pieces, None):
        assert errors["fill"] == 0
        assert errors["norm"] < 1e-6
        assert errors["clipped"] < 1e-5
        assert errors["below the limit"] == 0


def test_no_gradients_have_norm_zero() -> None:
    assert float(gradient_norm([torch.nn.Parameter(torch.ones(2))])) == 0


class Three:
    num_tokens = 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: num_tokens((1, "x")), RuntimeError, "none of 2 positional arguments tells num_tokens"),
        (lambda: num_tokens((torch.ones(1), Three())), None, ""),
    ],
)
def test_the_grid_tells_the_tokens(call: Callable[[], int], error: type[Exception] | None, message: str) -> None:
    if error is None:
        assert call() == 3
    else:
        with pytest.raises(error, match=message):
            call()


def test_padding_keeps_what_is_there() -> None:
    x = torch.arange(6.0).reshape(1, 3, 2)
    assert torch.equal(pad_to(x, 1, 4)[:, :3], x)
    assert pad_to(x, 1, 4)[:, 3:].abs().max() == 0
    assert pad_to(x, 1, 3) is x
    assert issubclass(PlanError, ValueError)
