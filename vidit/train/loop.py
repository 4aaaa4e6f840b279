"""The training loop: its sections in a fixed order, for every task and every layout.

fetch -> noise, forward, backward -> judge -> clip -> update -> average -> log -> save -> review -> maybe stop.
What differs between tasks is the step function, between layouts the passes; both are passed in. Every rank runs
the loop, and all take each decision alike: on what `exchange` tells them of one another, never on what one alone
has seen.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from parallel.exchange import exchange
from parallel.gradients import clip_gradients
from parallel.telemetry import Communication
from vidit.data.loader import Batch
from vidit.resolve import resolve
from vidit.train.entry import Entry
from vidit.train.fetch import Fetched, fetch
from vidit.train.goodput import Ledger
from vidit.train.metrics import Reporter, Stopwatch
from vidit.train.optim import learning_rate
from vidit.train.outcome import Outcome, forward_backward
from vidit.train.pace import Pace
from vidit.train.recovery import Fault, Recovery
from vidit.train.saves import Saves
from vidit.train.skips import SkipCount
from vidit.train.state import TrainState
from vidit.train.stop import StoppedError, StopRequest
from vidit.train.task import Task

COUNTED = 1  # which step of a start is counted with parallel.count_communication: the first one also sets things up

Beat = Callable[[int, str], None]
Account = Callable[[int, Fetched], Entry]


@dataclass(frozen=True)
class Watchers:
    """Who is told of the loop. `beat`: each section that begins; `review`: each step that is complete and saved;
    `account`: the clips of each step; what it answers stands in the step's line, and is said.
    """

    review: Callable[[int], None]
    reporter: Reporter
    ledger: Ledger
    stop: StopRequest
    beat: Beat
    account: Account


class TrainLoop:
    """Trains `state` to `train.steps`, in place.

    `held` are the facts of the checkpoint that the state came from, `facts` those of every one to come. Every way out
    but an error of a step itself leaves a checkpoint of the step before. A review comes after the save, a failure
    in it loses nothing, and a resume begins with that of the step it resumes from.
    """

    def __init__(
        self,
        task: Task,
        state: TrainState,
        data: Iterator[Batch],
        watchers: Watchers,
        checkpoints: Path,
        facts: dict[str, Any],
        held: dict[str, Any],
        peak_flops: float | None,
    ):
        self.task, self.state, self.data, self.watchers, self.facts = task, state, data, watchers, facts
        self.c, self.reporter, self.beat = task.config.train, watchers.reporter, watchers.beat
        self.accumulation = resolve(task.config).accumulation
        self.skips = SkipCount(task.config.data.max_skipped, self.reporter, tuple(held.get("skips", (0, 0))))
        self.recovery = Recovery(self.c, held.get("recovery", {}))
        self.saves = Saves(state, self.recovery, self.reporter, checkpoints, facts, self.c, self.beat)
        self.watch, self.first, self.known = Stopwatch(), state.step + 1, set[Any]()
        self.counted = self.first + COUNTED if task.config.parallel.count_communication else None
        self.pace = Pace(task, self.reporter, self.watch, peak_flops)

    def run(self) -> bool:
        """True when done, False when a signal asked to leave.

        Raises NonFiniteError and SpikeError where `train.on_...` says so, before the bad update, naming the clips of
        the batch, and SkipLimitError.
        """
        state, ledger, watch = self.state, self.watchers.ledger, self.watch
        state.model.train()
        try:
            if state.step:
                self.beat(state.step, "review")
                self.watchers.review(state.step)
            ledger.started("review")
            while state.step < self.c.steps:
                self.watchers.stop.check()
                self._step(state.step + 1)
        except StoppedError:
            self.saves.leave()
            watch.lap("checkpoint")
            ledger.write(state.step, watch.totals, end="stopped")
            return False
        self.saves.finish()
        watch.lap("checkpoint")
        ledger.write(state.step, watch.totals, end="done")
        return True

    def _step(self, step: int) -> None:
        fetched, entry = self._fetch(step)
        self.beat(step, "compute" if self.known.issuperset(fetched.shapes) else "first pass")
        self.known.update(fetched.shapes)
        sent = Communication() if step == self.counted else None
        with self.task.counted(sent):
            outcome = forward_backward(self.task, fetched.batches, self.task.networks)
        self.watch.lap("compute")
        row = self._update(step, fetched, outcome, sent)
        self._log(step, fetched, outcome, row, entry)
        if step == self.c.steps or step % self.c.checkpoint_every == 0 or "rolled_back_to" in row:
            self._save()
        self._review(step)

    def _fetch(self, step: int) -> tuple[Fetched, Entry]:
        """The clips of a step, on record before they are used."""
        self.beat(step, "data")
        try:
            # Who waits in the agreement waits for one that is not here yet.
            fetched = fetch(self.task, self.data, self.accumulation, step, partial(self.beat, step, "agreement"))
            self.watch.lap("data")
            self.skips.add(len(fetched.keys), fetched.skipped)
            self.facts["skips"] = [self.skips.seen, self.skips.skipped]
            return fetched, self.watchers.account(step, fetched)
        except (ValueError, RuntimeError, OSError) as error:
            self.saves.leave_after(error)
            raise

    def _update(self, step: int, fetched: Fetched, outcome: Outcome, sent: Communication | None) -> dict[str, Any]:
        """Clip and update, or recover from a fault; what the metrics say of the step."""
        self.beat(step, "update")
        task, state, recovery = self.task, self.state, self.recovery
        norm, rate = float(outcome.norm), learning_rate(self.c, state.step)
        fault = recovery.judge(step, outcome.loss, norm, outcome.finite, fetched.keys)
        if fault is None:
            for parameters, its_norm in zip(task.networks, outcome.norms, strict=True):
                clip_gradients(parameters, self.c.clip_norm, its_norm)
            with task.counted(sent):
                update(state, rate)
            task.step.updated(state.model, outcome.parts)
            recovery.updated(outcome.loss)
            row = {"loss": outcome.loss, "grad_norm": norm, "lr": rate, **outcome.parts}
        else:
            row = recover(fault, outcome, state, recovery, self.saves, self.watchers, self.watch)
        state.step = step
        state.clips += fetched.num_rows
        self.pace.add(fetched, outcome, self.watch.lap("update"))
        if sent is not None:
            self.reporter.speed({"step": step, "communication": exchange(sent.as_dict())})
        return row

    def _log(self, step: int, fetched: Fetched, outcome: Outcome, row: dict[str, Any], entry: Entry) -> None:
        ledger, watch = self.watchers.ledger, self.watch
        record(self.reporter, self.state, row, fetched, entry)
        if step == self.c.steps or step % self.c.log_every == 0:
            self.pace.report(step, outcome, float(outcome.norm), learning_rate(self.c, step - 1))
        watch.lap("log")
        if step == self.first:
            ledger.started("first step")
            watch.totals.clear()  # all of that was the start
        ledger.write(step, watch.totals, now=step == self.first)

    def _save(self) -> None:
        if self.saves.due:
            self.saves.save()
            self.watch.lap("checkpoint")
            self.watchers.ledger.write(self.state.step, self.watch.totals)

    def _review(self, step: int) -> None:
        self.beat(step, "review")
        try:
            self.watchers.review(step)
        except Exception as error:
            self.saves.leave_after(error)
            raise
        self.watch.lap("review")


def update(state: TrainState, rate: float) -> None:
    """One update of weights and averages, from gradients that are there."""
    state.optimizer.set_learning_rate(rate)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.ema.update(state.model, state.updates)


def recover(
    fault: Fault,
    outcome: Outcome,
    state: TrainState,
    recovery: Recovery,
    saves: Saves,
    watchers: Watchers,
    watch: Stopwatch,
) -> dict[str, Any]:
    """Leave the step without an update, or go back and pass over the steps up to it; what the metrics say of it.

    Raises the fault's error where the run is to stop.
    """
    step, clips = state.step + 1, state.clips
    fault.error.rank = outcome.bad_rank
    try:
        recovery.charge(step, fault)
    except RuntimeError:
        saves.finish()
        raise
    state.optimizer.zero_grad()
    row: dict[str, Any] = {"no_update": fault.reason}
    if fault.action == "skip":
        recovery.passed_over(step, step)
        state.num_passed += 1
        watchers.reporter.say(f"{fault.reason}; its update is skipped")
        return row
    watchers.beat(step, "roll back")
    back = saves.go_back(fault)
    recovery.passed_over(back + 1, step)
    state.num_passed += step - back
    watchers.ledger.roll_back(back, watch.totals)
    state.clips = clips
    watchers.reporter.say(f"{fault.reason}; back to the weights of step {back}, steps {back + 1} to {step} passed over")
    return row | {"rolled_back_to": back}


def record(reporter: Reporter, state: TrainState, row: dict[str, Any], fetched: Fetched, entry: Entry) -> None:
    """The line of a step in metrics.jsonl, with what the account says of it."""
    lost = {"skipped": fetched.skipped} if fetched.skipped else {}
    reporter.record({"step": state.step, "clips": state.clips, **row, "keys": fetched.keys, **lost, **entry.row})
    for line in entry.lines:
        reporter.say(line)
