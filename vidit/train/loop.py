"""The training loop: one function, its sections in a fixed order, for every task and every layout.

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


def train_loop(
    task: Task,
    state: TrainState,
    data: Iterator[Batch],
    watchers: Watchers,
    checkpoints: Path,
    facts: dict[str, Any],
    held: dict[str, Any],
    peak_flops: float | None,
) -> bool:
    """Train `state` to `train.steps`, in place. True when done, False when a signal asked to leave.

    `held` are the facts of the checkpoint that the state came from, `facts` those of every one to come. Every way out
    but an error of a step itself leaves a checkpoint of the step before. A review comes after the save, a failure
    in it loses nothing, and a resume begins with that of the step it resumes from. Raises NonFiniteError and SpikeError
    where `train.on_...` says so, before the bad update, naming the clips of the batch, and SkipLimitError.
    """
    c, accumulation = task.config.train, resolve(task.config).accumulation
    review, reporter, ledger, beat = watchers.review, watchers.reporter, watchers.ledger, watchers.beat
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    skips = SkipCount(task.config.data.max_skipped, reporter, tuple(held.get("skips", (0, 0))))
    recovery = Recovery(c, held.get("recovery", {}))
    saves = Saves(state, recovery, reporter, checkpoints, facts, c, beat)
    watch, first, known = Stopwatch(), state.step + 1, set[Any]()
    counted = first + COUNTED if task.config.parallel.count_communication else None
    pace = Pace(task, reporter, watch, peak_flops)
    state.model.train()

    def save() -> None:
        if saves.due:
            saves.save()
            watch.lap("checkpoint")
            ledger.write(state.step, watch.totals)

    try:
        if state.step:
            beat(state.step, "review")
            review(state.step)
        ledger.started("review")
        while state.step < c.steps:
            watchers.stop.check()
            step = state.step + 1
            beat(step, "data")
            try:
                # Who waits in the agreement waits for one that is not here yet.
                fetched = fetch(task, data, accumulation, step, partial(beat, step, "agreement"))
                watch.lap("data")
                skips.add(len(fetched.keys), fetched.skipped)
                facts["skips"] = [skips.seen, skips.skipped]
                entry = watchers.account(step, fetched)
            except (ValueError, RuntimeError, OSError) as error:
                saves.leave_after(error)
                raise

            beat(step, "compute" if known.issuperset(fetched.shapes) else "first pass")
            known.update(fetched.shapes)
            sent = Communication() if step == counted else None
            with task.counted(sent):
                outcome = forward_backward(task, fetched.batches, parameters)
            watch.lap("compute")

            beat(step, "update")
            norm, rate = float(outcome.norm), learning_rate(c, state.step)
            fault = recovery.judge(step, outcome.loss, norm, outcome.finite, fetched.keys)
            if fault is None:
                clip_gradients(parameters, c.clip_norm, outcome.norm)
                with task.counted(sent):
                    update(state, rate)
                recovery.updated(outcome.loss)
                row = {"loss": outcome.loss, "grad_norm": norm, "lr": rate, **outcome.parts}
            else:
                row = recover(fault, outcome, state, recovery, saves, watchers, watch)
            state.step = step
            state.clips += fetched.num_rows
            pace.add(fetched, outcome, watch.lap("update"))

            if sent is not None:
                reporter.speed({"step": step, "communication": exchange(sent.as_dict())})
            record(reporter, state, row, fetched, entry)
            if step == c.steps or step % c.log_every == 0:
                pace.report(step, outcome, norm, rate)
            watch.lap("log")
            if step == first:
                ledger.started("first step")
                watch.totals.clear()  # all of that was the start
            ledger.write(step, watch.totals, now=step == first)

            if step == c.steps or step % c.checkpoint_every == 0 or "rolled_back_to" in row:
                save()
            beat(step, "review")
            try:
                review(step)
            except Exception as error:
                saves.leave_after(error)
                raise
            watch.lap("review")
    except StoppedError:
        saves.leave()
        watch.lap("checkpoint")
        ledger.write(state.step, watch.totals, end="stopped")
        return False
    saves.finish()
    watch.lap("checkpoint")
    ledger.write(state.step, watch.totals, end="done")
    return True


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
