"""Forward and backward of a step, and what all ranks know of it before they decide on its update."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from parallel.exchange import any_rank, exchange, in_order
from parallel.gradients import complete_gradients, gradient_norm
from vidit.data.loader import Batch
from vidit.train.task import Task


@dataclass(frozen=True)
class Outcome:
    """Losses and quantiles of every row of the step, the mean loss and its parts, the norm of each network's gradient.

    `finite` is said of the loss and the gradient of all ranks, so it is the same on all; `bad_rank` is the first with
    a loss that is not. `own_s`: CPU seconds of this process, 0 on an accelerator, where waiting looks like work.
    """

    losses: list[float]
    quantiles: list[float]
    parts: dict[str, float]
    loss: float
    norms: list[Tensor]
    finite: bool
    bad_rank: int | None
    own_s: float

    @property
    def norm(self) -> Tensor:
        """Of the model itself, not of what judges it."""
        return self.norms[0]


def forward_backward(task: Task, batches: Sequence[Batch], networks: Sequence[Sequence[nn.Parameter]]) -> Outcome:
    """Give the parameters of `networks` (as `Task.networks`) the gradients of one step. Collective."""
    began = time.process_time()
    own = task.passes.forward_backward(batches)
    norms = []
    for parameters in networks:
        complete_gradients(parameters)
        norms.append(gradient_norm(parameters, task.pipeline, task.passes.shared))
    own_s = 0.0 if task.step.device.type != "cpu" else time.process_time() - began
    own_losses: list[Any] = [[r.rows_B.tolist(), r.quantile_B.tolist(), r.parts] for r in own]
    told = exchange(own_losses, task.rows)
    results = in_order(told)
    losses = _flat(results)
    loss = sum(losses) / len(losses)
    bad = [place for place, of_rank in enumerate(told) if not all(map(math.isfinite, _flat(of_rank)))]
    return Outcome(
        losses=losses,
        quantiles=[value for _, values, _ in results for value in values],
        parts={k: sum(p[k] for _, _, p in results) / len(results) for k in results[0][2]},
        loss=loss,
        norms=norms,
        # Copies of a gradient that one rank alone holds damaged give that rank alone a norm that is not finite.
        finite=not any_rank(not all(map(math.isfinite, (loss, *map(float, norms))))),
        bad_rank=task.rank_of(bad[0]) if bad else None,
        own_s=own_s,
    )


def _flat(told: list[Any]) -> list[float]:
    """The losses among what one data rank tells of its micro-batches."""
    return [value for values, _, _ in told for value in values]
