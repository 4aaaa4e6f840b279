"""The optimizer and its schedule.

AdamW (1711.05101) for everything, or Muon for the matrices of the layers and AdamW for the rest, at one rate.
Parameters may be plain or divided over ranks, on several meshes in one model; moments are divided as they are.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parallel.dtensor import local
from vidit.config import Train, VaeTrain
from vidit.dtypes import wide
from vidit.train.muon import Muon
from vidit.train.precision import has_bf16
from vidit.vae.discriminator import JUDGE

# The matrices between hidden vectors. Modulation maps the conditioning, and its first factor has two rows.
_HIDDEN = re.compile(r"(^|\.)(blocks|layers)\.\d+\.(?!modulation\.).*weight$")


class AdamW(torch.optim.AdamW):
    """torch's, stepping on local tensors: the rule is elementwise, and its fused form takes one mesh at a time."""

    def _init_group(self, group: Any, params: Any, grads: Any, *moments_and_steps: Any) -> Any:
        is_complex = super()._init_group(group, params, grads, *moments_and_steps)
        for tensors in (params, grads, *moments_and_steps):
            tensors[:] = [local(tensor) for tensor in tensors]
        return is_complex


_STATES: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    AdamW: ("exp_avg", "exp_avg_sq"),
    Muon: ("momentum_buffer",),
}


class Optimizers:
    """One or more optimizers of disjoint parameters that step as one."""

    def __init__(self, *members: torch.optim.Optimizer):
        self.members = members

    def set_learning_rate(self, rate: float) -> None:
        for member in self.members:
            for group in member.param_groups:
                group["lr"] = rate * group.get("rate", 1.0)

    def step(self) -> None:
        for member in self.members:
            member.step()

    def zero_grad(self) -> None:
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def states(self) -> Iterator[tuple[nn.Parameter, dict[str, Tensor]]]:
        """Each parameter with its moments by name, allocated if there was no step yet: a load needs somewhere to go."""
        for member in self.members:
            names = _STATES[type(member)]
            for p in (p for group in member.param_groups for p in group["params"]):
                state = member.state[p]
                if not state:
                    state |= {name: torch.zeros_like(p) for name in names}
                    if isinstance(member, AdamW):
                        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                yield p, {name: state[name] for name in names}

    def set_step(self, step: int) -> None:
        """Tell AdamW, whose bias correction counts, how many steps were made."""
        for member in self.members:
            for state in member.state.values():
                if "step" in state:
                    state["step"].fill_(step)


def build_optimizer(c: Train, parameters: Mapping[str, nn.Parameter], judge: VaeTrain | None = None) -> Optimizers:
    """Over every trainable parameter, given by name; matrices decay, vectors and tables of one dim do not.

    judge: how a discriminator among them is trained: by AdamW, with betas and a rate of its own.
    """
    given = {name: p for name, p in parameters.items() if p.requires_grad}
    judges = [p for name, p in given.items() if name.startswith(JUDGE)]
    trainable = {name: p for name, p in given.items() if not name.startswith(JUDGE)}
    hidden = [p for name, p in trainable.items() if c.optimizer == "muon" and p.ndim == 2 and _HIDDEN.search(name)]
    taken = {id(p) for p in hidden}
    others = [p for p in trainable.values() if id(p) not in taken]
    groups = []
    for decay in (True, False):
        own = [p for p in others if (p.ndim > 1) == decay]
        if own:
            groups.append({"params": own, "weight_decay": c.weight_decay if decay else 0.0})
    members: list[torch.optim.Optimizer] = []
    if groups:
        members.append(AdamW(groups, lr=c.learning_rate, betas=c.betas, eps=c.eps, fused=True))
    if hidden:
        dtype = wide(hidden[0].dtype)
        if dtype == torch.float32 and has_bf16(hidden[0].device):
            dtype = torch.bfloat16
        members.append(Muon(hidden, c.learning_rate, c.weight_decay, c.muon_momentum, dtype))
    if judge and judges:
        group: dict[str, Any] = {"params": judges, "rate": judge.discriminator_rate, "weight_decay": 0.0}
        members.append(AdamW([group], lr=c.learning_rate, betas=judge.discriminator_betas, eps=c.eps, fused=True))
    return Optimizers(*members)


def learning_rate(c: Train, step: int) -> float:
    """The rate of step `step` (0 for the first): linear warm-up, then constant or cosine to the end."""
    warm = min(1.0, (step + 1) / c.warmup_steps) if c.warmup_steps else 1.0
    if c.schedule == "constant":
        return c.learning_rate * warm
    done = max(0, step - c.warmup_steps) / max(1, c.steps - c.warmup_steps)
    low = c.final_learning_rate
    return c.learning_rate * warm * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
