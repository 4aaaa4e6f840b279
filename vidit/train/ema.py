"""Exponential moving average of the trained weights, fp32.

The decay starts low, min(decay, (1 + n) / (10 + n)) at update n, so that the first noise is soon forgotten.
"""

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

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the module's weights with the averages; a second call puts them back."""
        for name, p in module.named_parameters():
            if name in self.averages:
                held = p.detach().clone()
                p.copy_(self.averages[name])
                self.averages[name].copy_(held)
