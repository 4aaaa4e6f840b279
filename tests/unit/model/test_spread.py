"""Rows of a table for tokens: the values and gradients of indexing, at any order of the tokens."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vidit.model.spread import Spread, spread

ROWS = torch.tensor([0, 0, 2, 1, 2, 2, 0])  # nothing has the last


@pytest.mark.parametrize("call", [spread, Spread.apply], ids=["here", "on CUDA"])
@pytest.mark.parametrize("shape", [(4, 5), (2, 4, 5)])
def test_it_is_indexing(shape: tuple[int, ...], call: Callable[..., Tensor]) -> None:
    table = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out = call(table, ROWS)
    expected = table[..., ROWS, :]
    assert torch.equal(out, expected)
    weight = torch.randn_like(out)
    found: tuple[Tensor, ...] = torch.autograd.grad((out * weight).sum(), table)
    torch.testing.assert_close(found, torch.autograd.grad((expected * weight).sum(), table), rtol=1e-14, atol=1e-14)
    assert found[0][..., 3, :].abs().max() == 0
