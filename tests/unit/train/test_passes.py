"""A step over micro-batches, one by one: gradients of the mean over all rows, and the last pass is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from vidit.data.loader import Batch
from vidit.data.rows import Clips
from vidit.train.passes import PlainPasses
from vidit.train.step import Losses


class Squares:
    """The loss of row r is (w r)^2."""

    def __call__(self, model: nn.ModuleDict, batch: Batch, purpose: str) -> Losses:
        assert purpose == "train"
        rows = torch.tensor(batch.rows, dtype=torch.float32)
        loss_B = model["dit"](rows[:, None])[:, 0].square()
        return Losses(loss_B, rows.double() / 10, {"first": float(rows[0])})


def test_gradients_of_the_mean() -> None:
    model = nn.ModuleDict({"dit": nn.Linear(1, 1, bias=False)})
    with torch.no_grad():
        model["dit"].weight.fill_(3)
    seen: list[tuple[bool, bool]] = []

    @contextmanager
    def around(last: bool) -> Iterator[None]:
        before = model["dit"].weight.grad is None
        yield
        seen.append((last, before))

    passes = PlainPasses(model, Squares(), around)
    batches = [Batch([2 * i, 2 * i + 1], Clips([]), None, None, [2 * i, 2 * i + 1], 6) for i in range(3)]
    results = passes.forward_backward(batches)
    assert seen == [(False, True), (False, False), (True, False)]
    assert model["dit"].weight.grad.item() == pytest.approx(2 * 3 * sum(r * r for r in range(6)) / 6)
    assert [r.rows_B.tolist() for r in results] == [[0, 9], [36, 81], [144, 225]]
    assert not any(r.rows_B.requires_grad for r in results)
    assert [r.parts["first"] for r in results] == [0, 2, 4]
    assert passes.evaluated is model
    assert not passes.shared
