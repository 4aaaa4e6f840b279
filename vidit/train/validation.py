"""Validation loss on fixed clips, noise and timesteps.

The loss of a flow or diffusion model at fixed noise and times tracks human preference (Movie Gen, Open-Sora;
papers.md section 9), where the training loss is too noisy to tell runs apart. It is reported for each band
of the timestep density too.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from vidit.data.loader import Batch
from vidit.train.step import Step


@torch.no_grad()
def validate(
    model: nn.ModuleDict, step: Step, batches: Sequence[Batch], num_bands: int, check: Callable[[], None]
) -> dict[str, float]:
    """{"loss", "loss_band_0", ...}: band 0 holds the cleanest timesteps. `check` may raise before each batch."""
    results = []
    for batch in batches:
        check()
        results.append(step(model, batch, "validation"))
    losses = torch.cat([r.rows_B.double().cpu() for r in results])
    quantiles = torch.cat([r.quantile_B for r in results])
    values = {"loss": float(losses.mean())}
    if bool(quantiles.any()):
        band = (quantiles * num_bands).long().clamp(max=num_bands - 1)
        for index in range(num_bands):
            if bool((band == index).any()):
                values[f"loss_band_{index}"] = float(losses[band == index].mean())
    for name in results[0].parts:
        values[name] = sum(r.parts[name] for r in results) / len(results)
    return values
