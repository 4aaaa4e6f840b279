"""Weight gradients put off: what a zero-bubble schedule fills its bubbles with (2401.10241, section 2).

The backward pass of a matrix product is two products of the same size: the gradient of its input, which the stage
before waits for (B), and that of its weight, which nobody waits for (W). Here the first is computed in the backward
pass, and what the second needs is kept until it is asked for.
torch can split a backward pass without help, by a walk over the autograd graph: it walks through a block again
for every parameter that reaches it in several places (the modulation), and with activation checkpointing recomputes
the block again as well. A module that takes part lets its product be replaced instead: `module.product` is called as
(x, weight, bias) and stands for `torch.nn.functional.linear`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class _Kept:
    """Of one product: its weight and bias with their way to the parameters, then input and output gradient."""

    weight: Tensor
    bias: Tensor | None
    x: Tensor | None = None
    grad: Tensor | None = None

    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        assert self.x is not None
        assert self.grad is not None
        grad, found = self.grad.flatten(0, -2), []
        if self.weight.requires_grad:
            found.append((self.weight, grad.T @ self.x.flatten(0, -2)))
        if self.bias is not None and self.bias.requires_grad:
            found.append((self.bias, grad.sum(0)))
        return found


class WeightGradients:
    """Products whose weight gradient is not computed yet, in the order of the backward passes."""

    def __init__(self) -> None:
        self.waiting: list[_Kept] = []

    def apply_to(self, module: nn.Module) -> None:
        """Let the module's product be this one's."""
        module.product = self.product  # type: ignore[assignment]

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x weight^T + bias, (..., in) -> (..., out)."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return F.linear(x, weight, bias)
        own_bias = None if bias is None else bias.detach()
        # Detached, so that the backward pass ends here and does not pass zeros on to the parameters.
        function: Any = _Product.apply
        out: Tensor = function(x, weight.detach(), own_bias, _Kept(weight, bias), self.waiting)
        return out

    def take(self) -> Callable[[], None]:
        """What computes the gradients that wait now, and adds them to the parameters'."""
        taken = list(self.waiting)
        self.waiting.clear()

        def run() -> None:
            while taken:
                pairs = taken.pop(0).gradients()
                if pairs:
                    tensors, gradients = zip(*pairs, strict=True)
                    torch.autograd.backward(tensors, gradients)

        return run


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kept: _Kept, waiting: list[_Kept]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kept, ctx.waiting = kept, waiting
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, weight = ctx.saved_tensors
        kept = ctx.kept
        kept.x, kept.grad = x, grad
        ctx.waiting.append(kept)
        ctx.kept = None
        return grad @ weight, None, None, None, None
