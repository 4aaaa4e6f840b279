"""What a run is at a step: weights, optimizer, average, progress; and its way to and from a checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from parallel import checkpoint
from vidit.train.ema import Ema
from vidit.train.optim import Optimizers


@dataclass
class TrainState:
    """Progress is counted in optimizer steps and in clips (rows); both start at 0."""

    model: nn.ModuleDict
    optimizer: Optimizers
    ema: Ema
    step: int = 0
    clips: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of a checkpoint, in one flat canonical naming: model., ema., and the optimizer's moments."""
        names = {p: name for name, p in self.model.named_parameters()}
        flat = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        flat |= {f"ema.{name}": tensor for name, tensor in self.ema.averages.items()}
        for p, moments in self.optimizer.states():
            flat |= {f"{moment}.{names[p]}": tensor for moment, tensor in moments.items()}
        return flat

    def save(self, root: Path, facts: dict[str, Any], keep: int, keep_every: int = 0) -> Path:
        """Write a checkpoint of this step and delete the oldest beyond `keep`."""
        folder = checkpoint.save(root, self.step, self.tensors(), {"step": self.step, "clips": self.clips, **facts})
        checkpoint.prune(root, keep)
        return folder

    def finish(self) -> None:
        pass

    def load(self, folder: Path) -> dict[str, Any]:
        """Resume from a checkpoint; returns its facts."""
        facts = checkpoint.load(folder, self.tensors(), prefix="")
        self.step, self.clips = int(facts["step"]), int(facts["clips"])
        self.optimizer.set_step(self.step)
        return facts
