"""Exponential moving average of the trained weights, fp32.

The decay starts low, min(decay, (1 + n) / (10 + n)) at update n, so that the first noise is soon forgotten.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averaged copies of the trainable parameters, under the parameters' own names."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.averages: dict[str, Tensor] = {
            name: p.detach().clone().float() for name, p in module.named_parameters() if p.requires_grad
        }

    @torch.no_grad()
    def update(self, module: nn.Module, updates: int) -> None:
        """Fold the current weights in; `updates` counts the optimizer steps before this one."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        parameters = dict(module.named_parameters())
        current = [parameters[name].detach() for name in self.averages]
        torch._foreach_lerp_(list(self.averages.values()), current, 1 - decay)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """While entered, the module has the averages for weights, in eval mode; then it is bit for bit as it was.

        The two are exchanged one parameter at a time, so that no second copy of the model is needed, and an error
        anywhere, in mid-exchange too, undoes what was exchanged: a failed validation leaves a state worth saving.
        """
        exchanged: list[str] = []
        training = module.training
        parameters = dict(module.named_parameters())
        try:
            for name in self.averages:
                self._exchange(name, parameters[name])
                exchanged.append(name)
            module.eval()
            yield
        finally:
            module.train(training)
            for name in exchanged:
                self._exchange(name, parameters[name])

    @torch.no_grad()
    def _exchange(self, name: str, p: nn.Parameter) -> None:
        held = p.detach().clone()
        p.copy_(self.averages[name])
        self.averages[name].copy_(held)
