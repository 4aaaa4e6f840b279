"""Forward and backward of one optimizer step, over all of its micro-batches, whatever the layout.

The training loop hands over the micro-batches of a step and gets the losses of their rows; gradients are then those of
the mean over the step's rows of this rank's data. `PlainPasses` goes through the micro-batches one by one;
`vidit.train.pipeline.PipelinePasses` sends them through the stages of a pipeline.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import nn

from vidit.data.loader import Batch
from vidit.train.step import Losses, Step

Around = Callable[[bool], AbstractContextManager[None]]
"""Called with whether the backward passes inside are the last of the step; entered around them."""


def nothing_around(last: bool) -> AbstractContextManager[None]:
    """For a model whose gradients need no care between micro-batches."""
    return nullcontext()


class Passes(Protocol):
    """What the loop needs to make gradients, and what validation and sampling call instead of the model."""

    @property
    def evaluated(self) -> nn.ModuleDict:
        """The model for passes without gradient, by any number of rows: a collective call where it is divided."""
        ...

    @property
    def shared(self) -> Sequence[nn.Parameter]:
        """Parameters that other ranks of the pipeline hold too, with the same gradient: a norm counts them once."""
        ...

    def forward_backward(self, batches: Sequence[Batch]) -> list[Losses]:
        """Give parameters that have none the gradients of one optimizer step; the losses of each micro-batch."""
        ...


class PlainPasses:
    """One micro-batch after the other, forward and backward, on the whole model.

    `around` is entered around each of them (`parallel.zero.zero_micro_batch`). Gradients are averaged over
    `data_ranks`, which need not have equally many rows each.
    """

    shared: Sequence[nn.Parameter] = ()

    def __init__(self, model: nn.ModuleDict, step: Step, around: Around = nothing_around, data_ranks: int = 1):
        self.evaluated, self.step, self.around, self.data_ranks = model, step, around, data_ranks

    def forward_backward(self, batches: Sequence[Batch]) -> list[Losses]:
        results = []
        for number, batch in enumerate(batches, 1):
            with self.around(number == len(batches)):
                result = self.step(self.evaluated, batch, "train")
                # How many micro-batches like this one a rank has in a step, in the mean.
                share = batch.step_rows / (self.data_ranks * len(batch.rows))
                (result.rows_B.mean() / share).backward()
            results.append(Losses(result.rows_B.detach(), result.quantile_B, result.parts))
        return results
