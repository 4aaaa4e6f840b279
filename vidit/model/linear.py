"""A linear layer that computes in the dtype of its input.

Master weights stay fp32 (or sharded fp32, or whatever a mixed-precision policy hands in); the cast is here,
in the open, and autocast is never used. The dtype of the tokens, set once in `embed`, decides the precision
of a whole block, and an fp32 input makes an fp32 island.
`product` is a seam: a pipeline that puts weight gradients off sets another function of (x, weight, bias) on a layer.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear` with weights cast to the dtype of `x`: (..., in_features) -> (..., out_features)."""

    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = staticmethod(F.linear)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self.product(x, self.weight.to(x.dtype), bias)
