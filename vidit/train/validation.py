"""Validation loss on fixed clips, noise and timesteps, with the averaged weights.

The loss of a flow or diffusion model at fixed noise and times tracks human preference (Movie Gen, Open-Sora;
papers.md section 9), where the training loss is too noisy to tell runs apart. It is reported for each band
of the timestep density too.
"""

from collections.abc import Sequence

import torch
from torch import nn

from vidit.data.loader import Batch
from vidit.train.ema import Ema
from vidit.train.step import Step


@torch.no_grad()
def validate(model: nn.ModuleDict, ema: Ema, step: Step, batches: Sequence[Batch], num_bands: int) -> dict[str, float]:
    """{"loss", "loss_band_0", ...}: band 0 holds the cleanest timesteps. Leaves the model as it was."""
    ema.swap(model)
    model.eval()
    try:
        results = [step(model, batch, "validation") for batch in batches]
    finally:
        model.train()
        ema.swap(model)
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
