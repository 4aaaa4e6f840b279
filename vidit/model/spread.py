"""A row of a small table for each token, with a backward pass that sums in one order and at full speed.

`index_select` has tens of thousands of tokens add their gradients to the few rows one by one, on CUDA in an order that
differs from run to run. Here they are summed by a product with ones and zeros.
"""

from typing import Any

import torch
from torch import Tensor


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_BRD: Tensor, row_S: Tensor) -> Tensor:
        ctx.save_for_backward(row_S)
        ctx.rows = table_BRD.shape[-2]
        return table_BRD.index_select(-2, row_S)

    @staticmethod
    def backward(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor, None]:
        (row_S,) = ctx.saved_tensors
        number_R = torch.arange(ctx.rows, device=row_S.device)
        return (number_R[:, None] == row_S).to(grad_BSD.dtype) @ grad_BSD, None


def spread(table_BRD: Tensor, row_S: Tensor) -> Tensor:
    """Rows (B, R, D) or (R, D) -> those of the tokens, (B, S, D) or (S, D); `row_S` (S,) int says which each has."""
    out: Tensor = _Spread.apply(table_BRD, row_S)
    return out
