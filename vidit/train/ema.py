"""Exponential moving average of the trained weights, in at least fp32.

The decay starts low, min(decay, (1 + n) / (10 + n)) at update n, so that the first noise is soon forgotten.
Averages are divided over ranks as the parameters are, and every rank works on its own parts: no communication.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from parallel.dtensor import local
from vidit.dtypes import widen


class Ema:
    """Averaged copies of the trainable parameters, under the parameters' own names.

    `without`: what the names of those begin with that are not averaged; "" for none.
    """

    def __init__(self, module: nn.Module, decay: float, without: str = ""):
        self.decay = decay
        self.averages: dict[str, Tensor] = {
            name: widen(p.detach().clone())
            for name, p in module.named_parameters()
            if p.requires_grad and not (without and name.startswith(without))
        }

    @torch.no_grad()
    def update(self, module: nn.Module, updates: int) -> None:
        """Fold the current weights in; `updates` counts the optimizer steps before this one."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        parameters = dict(module.named_parameters())
        averages = [local(average) for average in self.averages.values()]
        current = [local(parameters[name]).to(a.dtype) for name, a in zip(self.averages, averages, strict=True)]
        if averages:  # a stage of a pipeline may have nothing that is trained
            torch._foreach_lerp_(averages, current, 1 - decay)

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
        weights, average = local(p), local(self.averages[name])
        held = weights.clone()
        weights.copy_(average)
        average.copy_(held)
