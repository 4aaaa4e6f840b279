"""Validation loss on fixed clips, noise and timesteps.

The loss of a flow or diffusion model at fixed noise and times tracks human preference (Movie Gen, Open-Sora;
papers.md section 9), where the training loss is too noisy to tell runs apart. It is reported for each band
of the timestep density too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from parallel.exchange import exchange, in_order
from vidit.data.loader import Batch
from vidit.evaluate.frechet import frechet_distance
from vidit.train.step import Step


@torch.no_grad()
def validate(
    model: nn.ModuleDict,
    step: Step,
    batches: Sequence[Batch],
    num_bands: int,
    check: Callable[[], None],
    num_batches: int | None = None,
    rows: Sequence[ProcessGroup | None] = (None,),
) -> dict[str, float]:
    """{"loss", "loss_band_0", ...}: band 0 holds the cleanest timesteps. `check` may raise before each batch.

    "frechet" is the distance of the features that the step gives, where it gives any of two rows or more.

    `batches` are this rank's of the `num_batches` that the ranks of `rows` have dealt out, as `fixed_batches` deals.
    """
    own: list[Any] = []
    for batch in batches:
        check()
        r = step(model, batch, "validation")
        features = [side.double().tolist() for side in r.features or ()]
        own.append([r.rows_B.double().tolist(), r.quantile_B.tolist(), r.parts, features])
    results = in_order(exchange(own, rows))[:num_batches]
    losses = torch.tensor([value for values, *_ in results for value in values], dtype=torch.float64)
    quantiles = torch.tensor([value for _, values, *_ in results for value in values], dtype=torch.float64)
    values = {"loss": float(losses.mean())}
    if bool(quantiles.any()):
        band = (quantiles * num_bands).long().clamp(max=num_bands - 1)
        for index in range(num_bands):
            if bool((band == index).any()):
                values[f"loss_band_{index}"] = float(losses[band == index].mean())
    for name in results[0][2]:
        values[name] = sum(parts[name] for _, _, parts, _ in results) / len(results)
    if results[0][3] and len(losses) > 1:
        clips, made = (
            torch.tensor([row for *_, sides in results for row in sides[side]], dtype=torch.float64) for side in (0, 1)
        )
        values["frechet"] = frechet_distance(clips, made)
    return values
