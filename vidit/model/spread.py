"""A row of a small table for each token, on CUDA with a backward pass that sums in one order and at full speed.

There the gradient of `index_select` has tens of thousands of tokens added to the few rows one by one, in an order that
differs from run to run; here they are summed by a product with ones and zeros. A CPU adds in order, and faster so.
"""

from typing import Any

import torch
from torch import Tensor


class Spread(torch.autograd.Function):
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
    if not table_BRD.is_cuda:
        return table_BRD.index_select(-2, row_S)
    out: Tensor = Spread.apply(table_BRD, row_S)
    return out
