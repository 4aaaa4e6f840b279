"""What a run is at a step: weights, optimizer, average, progress; and its way to and from a checkpoint."""

from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from parallel import checkpoint
from vidit.train.ema import Ema
from vidit.train.optim import Optimizers


@dataclass
class TrainState:
    """Progress is counted in steps, of which `num_passed` made no update, and in clips (rows); all start at 0.

    Parameters may be divided over ranks in any way; then `save`, `finish` and `load` are called by every rank. With
    `background` a save returns when the tensors are copied. `save_timeout_s` has to be shorter than the timeout of the
    process group.
    """

    model: nn.ModuleDict
    optimizer: Optimizers
    ema: Ema
    step: int = 0
    clips: int = 0
    num_passed: int = 0
    background: InitVar[bool] = False
    save_timeout_s: InitVar[float] = 300.0
    saver: checkpoint.Saver = field(init=False)

    def __post_init__(self, background: bool, save_timeout_s: float) -> None:
        self.saver = checkpoint.Saver(background, save_timeout_s)

    @property
    def updates(self) -> int:
        """How often the weights have been updated: what Adam's bias correction and the average count."""
        return self.step - self.num_passed

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of a checkpoint, in one flat canonical naming: model., ema., and the optimizer's moments."""
        names = {p: name for name, p in self.model.named_parameters()}
        flat = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        flat |= {f"ema.{name}": tensor for name, tensor in self.ema.averages.items()}
        for p, moments in self.optimizer.states():
            flat |= {f"{moment}.{names[p]}": tensor for moment, tensor in moments.items()}
        return flat

    def save(self, root: Path, facts: dict[str, Any], keep: int, keep_every: int = 0) -> Path:
        """Write a checkpoint of this step; then delete the oldest beyond `keep`, but no multiple of `keep_every`.

        Raises CheckpointError, on every rank the same, where this save fails or, with `background`, the one before.
        """
        progress = {"step": self.step, "clips": self.clips, "num_passed": self.num_passed}
        return self.saver.save(root, self.step, self.tensors(), {**progress, **facts}, keep, keep_every)

    def finish(self) -> None:
        """Wait until the last save is whole. Raises CheckpointError, on every rank the same, where it failed."""
        self.saver.finish()

    def load(self, folder: Path) -> dict[str, Any]:
        """Resume from a checkpoint, whatever layout wrote it; returns its facts."""
        facts = checkpoint.load(folder, self.tensors(), prefix="")
        self.step, self.clips = int(facts["step"]), int(facts["clips"])
        self.num_passed = int(facts.get("num_passed", 0))
        self.optimizer.set_step(self.updates)
        return facts
