"""AdamW (1711.05101), its schedule, and the gradient norm."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vidit.config import Train


def build_optimizer(c: Train, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW over every trainable parameter; matrices decay, vectors and tables of one dim do not."""
    trainable = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": c.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=c.learning_rate, betas=c.betas, eps=c.eps, fused=True)


def learning_rate(c: Train, step: int) -> float:
    """The rate of step `step` (0 for the first): linear warm-up, then constant or cosine to the end."""
    warm = min(1.0, (step + 1) / c.warmup_steps) if c.warmup_steps else 1.0
    if c.schedule == "constant":
        return c.learning_rate * warm
    done = max(0, step - c.warmup_steps) / max(1, c.steps - c.warmup_steps)
    low = c.final_learning_rate
    return c.learning_rate * warm * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients together, fp32."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale every gradient so that the norm is at most `max_norm` (1211.5063)."""
    torch.nn.utils.clip_grads_with_norm_(list(parameters), max_norm, norm)
