"""Runs with a planted fault, and the run that they should equal: one that by itself makes no update at given steps."""

from __future__ import annotations

import io
import math
import time
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from parallel.dtensor import local
from vidit.config import RunConfig
from vidit.data.loader import MicroBatches
from vidit.train import loop
from vidit.train.ema import Ema
from vidit.train.optim import Optimizers
from vidit.train.run import run
from vidit.train.step import DitStep, Losses


@dataclass(frozen=True)
class Case:
    """`scaled`: step -> by what the last rank's loss is multiplied there. `poisoned`: after the update of that step
    the last rank holds a weight that is not finite. `unmade`: updates that the reference leaves out. `slow_s`: what the
    last rank takes longer for each micro-batch. `clock_s`: by what its clock is off.
    """

    config: RunConfig
    scaled: dict[int, float] = field(default_factory=dict)
    poisoned: int = 0
    unmade: tuple[int, ...] = ()
    slow_s: float = 0.0
    clock_s: float = 0.0


def start(case: Case) -> str:
    """One rank of one start; what it said."""
    faulty = dist.get_rank() == dist.get_world_size() - 1
    said = io.StringIO()
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(said))
        if faulty and case.scaled:
            stack.enter_context(patch.object(DitStep, "loss", scaled_loss(case.scaled)))
        if faulty and case.poisoned:
            stack.enter_context(patch.object(loop, "update", poisoned_update(case.poisoned)))
        if case.unmade:
            leave_out(case.unmade, stack)
        if faulty and case.slow_s:
            stack.enter_context(patch.object(MicroBatches, "__getitem__", slow_reading(case.slow_s)))
        if faulty and case.clock_s:
            now = time.time
            stack.enter_context(patch("time.time", lambda: now() + case.clock_s))
        run(case.config)
    return said.getvalue()


def scaled_loss(factors: dict[int, float]) -> Any:
    original = DitStep.loss

    def loss(self: DitStep, output: Any, inputs: Any, video: Any) -> Losses:
        found = original(self, output, inputs, video)
        step = inputs.rows[0] // self.numbers_per_step + 1
        factor = factors.get(step, 1.0) if inputs.purpose == "train" else 1.0
        return found if factor == 1.0 else replace(found, rows_B=found.rows_B * factor)

    return loss


def poisoned_update(step: int) -> Any:
    original = loop.update

    def update(state: Any, rate: float) -> None:
        original(state, rate)
        if state.step + 1 == step:
            weights = [local(p) for p in state.model.parameters() if local(p).numel()]
            with torch.no_grad():
                weights[0].view(-1)[0] = math.inf

    return update


def slow_reading(seconds: float) -> Any:
    original = MicroBatches.__getitem__

    def read(self: MicroBatches, index: int) -> Any:
        time.sleep(seconds)
        return original(self, index)

    return read


def leave_out(steps: tuple[int, ...], stack: ExitStack) -> None:
    """Without what the loop knows of it: the optimizer and the average are not called, and so do not count."""
    step, average, calls = Optimizers.step, Ema.update, {"step": 0, "average": 0}

    def optimize(self: Optimizers) -> None:
        calls["step"] += 1
        if calls["step"] not in steps:
            step(self)

    def fold(self: Ema, module: Any, _: int) -> None:
        calls["average"] += 1
        if calls["average"] not in steps:
            average(self, module, sum(n not in steps for n in range(1, calls["average"])))

    stack.enter_context(patch.object(Optimizers, "step", optimize))
    stack.enter_context(patch.object(Ema, "update", fold))
