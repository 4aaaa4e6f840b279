"""The checkpoints of a run: when they are written, which one it resumes from, and how it goes back to one.

A checkpoint whose files differ from their hashes is set aside as `step-XXXXXXXX.damaged`, which nothing reads or
deletes, and the one before it is taken. So is one that holds a number that is not finite, where a run goes back to it.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from parallel import checkpoint
from parallel.checkpoint import DamagedError
from parallel.dtensor import local
from parallel.exchange import any_rank, from_first, num_ranks
from parallel.failure import is_shared
from vidit.config import Train
from vidit.train.metrics import Reporter
from vidit.train.recovery import Fault, Recovery
from vidit.train.state import TrainState


def resume(root: Path, state: TrainState) -> tuple[dict[str, Any], list[str]]:
    """Load the newest checkpoint under `root` that is whole: its facts, {} without any, and what to tell the user.

    Collective. Raises CheckpointError where it does not fit the model, and where every one there is damaged.
    """
    notes: list[str] = []
    while steps := from_first(lambda: checkpoint.steps(root)):
        folder = checkpoint.folder_of(root, steps[-1])
        try:
            return state.load(folder), notes
        except DamagedError as error:
            notes.append(f"{error}. It is kept as {from_first(partial(_set_aside, folder))}")
    if damaged := from_first(lambda: sorted(path.name for path in root.glob("step-*.damaged"))):
        said = "; ".join(notes) or ", ".join(damaged)
        raise checkpoint.CheckpointError(
            f"no checkpoint under {root} is whole: {said}. Repair one of them and give it its name back, or give a new "
            "run_dir"
        )
    return {}, notes


def _set_aside(folder: Path) -> str:
    return str(checkpoint.set_aside(folder))


class Saves:
    """Saves of one start in `root`, with `facts` that do not change; `beat` is told of each. Methods are collective."""

    def __init__(
        self,
        state: TrainState,
        recovery: Recovery,
        reporter: Reporter,
        root: Path,
        facts: dict[str, Any],
        c: Train,
        beat: Callable[[int, str], None],
    ):
        self.state, self.recovery, self.reporter, self.beat = state, recovery, reporter, beat
        self.root, self.facts, self.c = root, facts, c
        self.saved_step = state.step

    @property
    def due(self) -> bool:
        """Whether there is a step that is not saved."""
        return self.state.step > self.saved_step

    def save(self) -> None:
        """Write a checkpoint of this step, where it has none."""
        if self.due:
            self.beat(self.state.step, "save")
            self.reporter.sync()
            facts = {**self.facts, "recovery": self.recovery.facts()}
            self.state.save(self.root, facts, self.c.keep_checkpoints, self.c.keep_every)
            self.saved_step = self.state.step

    def leave(self) -> None:
        """Save, and wait until it is whole."""
        self.save()
        self.finish()

    def finish(self) -> None:
        """Wait until the last save is whole."""
        self.beat(self.state.step, "save")
        self.state.finish()

    def leave_after(self, error: Exception) -> None:
        """Save too, unless this rank may be alone with the error: the others would not come to save with it."""
        if num_ranks() == 1 or is_shared(error):
            self.leave()

    def go_back(self, fault: Fault) -> int:
        """The state of an earlier checkpoint, and everything newer deleted; its step.

        It is the `train.roll_back_checkpoints`-th newest, or the first before that which is whole and finite.
        """
        self.finish()
        while steps := from_first(self._earlier):
            folder = checkpoint.folder_of(self.root, steps[-1])
            try:
                facts = self.state.load(folder)
            except DamagedError as error:
                self.reporter.say(f"{folder} is damaged, so the one before it is taken: {error}")
            else:
                if not any_rank(not self._finite()):
                    self.recovery.load(facts.get("recovery", {}))
                    from_first(lambda: self._forget_after(self.state.step))
                    return self.state.step
                self.reporter.say(f"{folder} holds numbers that are not finite, so the one before it is taken")
            from_first(partial(_set_aside, folder))
        raise type(fault.error)(f"{fault.error}. There is no checkpoint to go back to") from fault.error

    def _earlier(self) -> list[int]:
        """Steps of the checkpoints that may be gone back to; the oldest where there are fewer than asked for."""
        steps = checkpoint.steps(self.root)
        return steps[: max(1, len(steps) + 1 - self.c.roll_back_checkpoints)]

    def _forget_after(self, step: int) -> None:
        """What was saved and recorded after a step is not of this run any more."""
        for newer in checkpoint.steps(self.root):
            if newer > step:
                checkpoint.remove(checkpoint.folder_of(self.root, newer))
        self.reporter.rewind(step)

    def _finite(self) -> bool:
        """Whether every number of this rank's part of the state is finite."""
        return all(bool(torch.isfinite(local(tensor)).all()) for tensor in self.state.tensors().values())
