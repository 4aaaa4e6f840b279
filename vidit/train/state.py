"""What a run is at a step: weights, optimizer, average, progress; and its way to and from a checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parallel import checkpoint
from vidit.train.ema import Ema

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainState:
    """Progress is counted in optimizer steps and in clips (rows); both start at 0."""

    model: nn.ModuleDict
    optimizer: torch.optim.Optimizer
    ema: Ema
    step: int = 0
    clips: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of a checkpoint, in one flat canonical naming: model., ema., exp_avg., exp_avg_sq."""
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        flat = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        flat |= {f"ema.{name}": tensor for name, tensor in self.ema.averages.items()}
        for name, p in named:
            self._ensure_moments(p)
            flat |= {f"{moment}.{name}": self.optimizer.state[p][moment] for moment in MOMENTS}
        return flat

    def _ensure_moments(self, p: nn.Parameter) -> None:
        """Allocate AdamW's state before its first step, so that a load has somewhere to go."""
        state = self.optimizer.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(p)

    def save(self, root: Path, facts: dict[str, Any], keep: int) -> Path:
        """Write a checkpoint of this step and delete the oldest beyond `keep`."""
        folder = checkpoint.save(root, self.step, self.tensors(), {"step": self.step, "clips": self.clips, **facts})
        checkpoint.prune(root, keep)
        return folder

    def load(self, folder: Path) -> dict[str, Any]:
        """Resume from a checkpoint; returns its facts."""
        facts = checkpoint.load(folder, self.tensors(), prefix="")
        self.step, self.clips = int(facts["step"]), int(facts["clips"])
        for p in self.model.parameters():
            if p in self.optimizer.state:
                self.optimizer.state[p]["step"].fill_(self.step)
        return facts
