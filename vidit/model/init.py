"""Initial values, one generator for each parameter, keyed by its full name.

The numbers do not depend on the order of construction, on other parameters or on sharding. Layers that end
a residual branch through a gate, and the output, start at zero (AdaLN-Zero, DiT 2212.09748), as does what may be added
to a trained model: the embedding of the frame rate, the output of attention through time (GenTron, 2312.04557), what
sees given frames (Open-Sora-Plan, 2412.00131). Linear layers are Xavier uniform; tables are normal with std 0.02, those
of a modulation with 1 / sqrt(D) (PixArt-alpha, 2310.00426).
"""

import math
import re

import numpy as np
import torch
from torch import Tensor, nn

from vidit import keys

ZERO = re.compile(
    r"(\.|^)(modulation\.up|modulation|shared|frame_rate\.out|head\.project|temporal\.out|patch\.given)\.(weight|bias)$|"
    r"attn\.bias\.table$"
)
# Of a U-Net what closes a residual branch, the parts over time in it, and how much of them is mixed in.
CLOSING = re.compile(r"(\.|^)(closing|parts\.\d+\.\w+\.(out|down))\.(weight|bias)$|(\.|^)mix\.logit$")
NORM = re.compile(r"norm\w*\.weight$")
TABLE = re.compile(r"(position\.(time|space)|table|embedding|position)(\.weight)?$")


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Fill every parameter of `module` (already materialised) in place, the same numbers for the same names."""
    for name, parameter in module.named_parameters():
        parameter.copy_(initial_value(name, tuple(parameter.shape), seed))


def initial_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The full initial tensor, fp32 on the CPU, for a parameter of that name."""
    if ZERO.search(name) or CLOSING.search(name):
        return torch.zeros(shape)
    if NORM.search(name):
        return torch.ones(shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    generator = keys.generator(seed, "init", name)
    if TABLE.search(name):
        std = shape[-1] ** -0.5 if name.endswith("modulation.table") else 0.02
        return torch.from_numpy(generator.standard_normal(shape, np.float32)) * std
    if len(shape) < 2:
        raise ValueError(f"no rule of initialisation fits parameter {name} of shape {shape}; add one in init.py")
    receptive = math.prod(shape[2:])
    bound = math.sqrt(6 / ((shape[0] + shape[1]) * receptive))
    return torch.from_numpy(generator.uniform(-bound, bound, shape).astype(np.float32))
