"""Muon: momentum whose update is made nearly orthogonal (K. Jordan et al., "Muon", 2024).

Same rule as `torch.optim.Muon` with `match_rms_adamw` (Moonlight, 2502.16982, eq. 4: an update as large as
AdamW's). That one works matrix by matrix and always in bf16, which older CPUs emulate: here matrices of one
shape are taken together, in the dtype that the device multiplies fast.

An update needs the whole matrix. Matrices that ranks divide are put together on one of these ranks each, all ranks
at work, and the parts of the updates are given back (`parallel/matrices.py`); momentum and weights stay divided.
"""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.dtensor import local
from parallel.matrices import on_whole

# Coefficients of the quintic, chosen to lift small singular values fast, and its number of steps (Jordan et al.).
QUINTIC = (3.4445, -4.7750, 2.0315)
NUM_STEPS = 5


class Muon(torch.optim.Optimizer):
    """For matrices only. `dtype` is that of the products; momentum and weights keep theirs.

    Raises ValueError for a parameter that is no matrix.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float, dtype: torch.dtype
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.ndim != 2:
                raise ValueError(f"Muon takes matrices, not a parameter of shape {tuple(p.shape)}; give it to AdamW")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; Nesterov momentum, decoupled weight decay."""
        for group in self.param_groups:
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape, (p.device_mesh, p.placements) if isinstance(p, DTensor) else None].append(p)
            for ((rows, columns), _), matrices in alike.items():
                weights, gradients = [local(p) for p in matrices], [local(p.grad) for p in matrices]
                buffers = [local(self._momentum(p)) for p in matrices]
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(gradients, buffers, group["momentum"])
                updates = on_whole(nesterov, matrices[0], self._orthogonal)
                size = 0.2 * math.sqrt(max(rows, columns))
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, updates, alpha=-group["lr"] * size)

    def _orthogonal(self, x_XMN: Tensor) -> Tensor:
        return orthogonal(x_XMN, self.dtype).to(x_XMN.dtype)

    def _momentum(self, p: nn.Parameter) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def orthogonal(x_XMN: Tensor, dtype: torch.dtype) -> Tensor:
    """Newton-Schulz: each matrix with its singular values moved near 1 (about 0.7 to 1.2), in `dtype`."""
    a, b, c = QUINTIC
    # The norm in the wider dtype: a CPU takes longer for it in bf16 than for all the products together.
    x = x_XMN / torch.linalg.vector_norm(x_XMN, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).to(dtype)
    for _ in range(NUM_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
