"""Forward and backward passes of one optimizer step."""

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from parallel.zero import zero_micro_batch
from vidit.data.loader import Batch
from vidit.train.step import Losses, Step


class Passes(Protocol):
    """What the loop needs: gradients of the mean loss of all rows of one optimizer step, whatever the layout."""

    def forward_backward(self, model: nn.ModuleDict, batches: Sequence[Batch]) -> list[Losses]:
        """Losses of each micro-batch; gradients are added to those that are there, ready for the norm."""
        ...


class PlainPasses:
    """One micro-batch after the other, each through the whole model."""

    def __init__(self, step: Step):
        self.step = step

    def forward_backward(self, model: nn.ModuleDict, batches: Sequence[Batch]) -> list[Losses]:
        results = []
        for number, batch in enumerate(batches, start=1):
            with zero_micro_batch(model, last=number == len(batches)):
                result = self.step(model, batch, "train")
                (result.rows_B.mean() / len(batches)).backward()
            results.append(Losses(result.rows_B.detach(), result.quantile_B, result.parts))
        return results
