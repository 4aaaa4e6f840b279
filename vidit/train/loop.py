"""The training loop: one function, its sections in a fixed order, for every task and every layout.

fetch -> noise, forward, backward -> check -> clip -> update -> average -> log -> save -> review -> maybe stop.
What differs between tasks is the step function, between layouts the passes; both are passed in. Every rank runs
the loop, and all take each decision alike: on what `exchange` tells them of one another, never on what one alone
has seen.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from parallel.exchange import exchange, in_order, together
from parallel.failure import is_shared
from parallel.gradients import clip_gradients, complete_gradients, gradient_norm
from parallel.telemetry import Communication
from vidit.data.loader import Batch
from vidit.resolve import resolve
from vidit.train.clips import require_same_clips
from vidit.train.metrics import Reporter, Stopwatch
from vidit.train.optim import learning_rate
from vidit.train.skips import SkipCount
from vidit.train.state import TrainState
from vidit.train.stop import StoppedError, StopRequest
from vidit.train.task import Task

COUNTED = 1  # which step of a start is counted with parallel.count_communication: the first one also sets things up


Beat = Callable[[int, str], None]


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not finite; the update was not made. `rank` had such a loss, where one had."""

    rank: int | None = None


def train_loop(
    task: Task,
    state: TrainState,
    data: Iterator[Batch],
    review: Callable[[int], None],
    reporter: Reporter,
    stop: StopRequest,
    checkpoints: Path,
    facts: dict[str, Any],
    peak_flops: float | None,
    beat: Beat,
) -> bool:
    """Train `state` to `train.steps`, in place. True when done, False when a signal asked to leave.

    Every way out but an error of a step itself leaves a checkpoint of the step before. `review` looks at a step that is
    complete, validation and samples: it comes after the save, a failure in it loses nothing, and a resume
    begins with that of the step it resumes from. Raises NonFiniteError before a bad update, naming the clips of
    the batch, and SkipLimitError. `beat` is told of each section that begins.
    """
    config, rows = task.config, task.rows
    c, resolved, counts = config.train, resolve(config), config.parallel.count_communication
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    skips = SkipCount(config.data.max_skipped, reporter)
    watch, window, worked = Stopwatch(), 0, [0, 0, 0.0]  # steps, and rows, tokens and FLOPs, since the last log
    saved_step = first_step = state.step
    state.model.train()

    def save() -> None:
        nonlocal saved_step
        if state.step > saved_step:
            beat(state.step, "save")
            reporter.sync()
            state.save(checkpoints, facts, c.keep_checkpoints, c.keep_every)
            saved_step = state.step

    def leave() -> None:
        save()
        state.finish()

    def leave_after(error: Exception) -> None:
        """Save too, unless this rank may be alone with the error: the others would not come to save with it."""
        if resolved.num_ranks == 1 or is_shared(error):
            leave()

    try:
        if state.step:
            beat(state.step, "review")
            review(state.step)
        watch.lap("review")
        while state.step < c.steps:
            stop.check()
            beat(state.step + 1, "data")
            try:
                with together():
                    batches = [next(data) for _ in range(resolved.accumulation)]
                    beat(state.step + 1, "agreement")  # who waits here waits for one that is not here yet
                watch.lap("data")
                own_keys: list[Any] = [[b.keys, b.skipped, len(b.rows), b.size] for b in batches]
                fetched = in_order(exchange(own_keys, rows))
                require_same_clips(fetched, f"step {state.step + 1}", config.data.train)
                keys = [key for used, _, _, _ in fetched for key in used]
                skipped = [(key, reason) for _, lost, _, _ in fetched for key, reason in lost]
                skips.add(keys, skipped)
            except (ValueError, RuntimeError, OSError) as error:
                leave_after(error)
                raise

            beat(state.step + 1, "compute")
            sent = Communication() if counts and state.step == first_step + COUNTED else None
            with task.counted(sent):
                own = task.passes.forward_backward(batches)
                complete_gradients(parameters)
                norm = gradient_norm(parameters, task.pipeline, task.passes.shared)
            own_losses: list[Any] = [[r.rows_B.tolist(), r.quantile_B.tolist(), r.parts] for r in own]
            told = exchange(own_losses, rows)
            results = in_order(told)
            losses = flat(results)
            quantiles = [value for _, values, _ in results for value in values]
            parts = {k: sum(p[k] for _, _, p in results) / len(results) for k in results[0][2]}
            watch.lap("compute")

            beat(state.step + 1, "update")
            loss = sum(losses) / len(losses)
            norm_value = float(norm)
            if not (math.isfinite(loss) and math.isfinite(norm_value)):
                state.finish()
                fault = NonFiniteError(
                    f"loss {loss} and gradient norm {norm_value} at step {state.step + 1}: not finite, no update made. "
                    f"Clips of the batch: {' '.join(keys)}. Look at them, lower train.learning_rate, or resume from "
                    "an earlier checkpoint"
                )
                bad = [place for place, of_rank in enumerate(told) if not all(map(math.isfinite, flat(of_rank)))]
                fault.rank = task.rank_of(bad[0]) if bad else None
                raise fault
            clip_gradients(parameters, c.clip_norm, norm)

            rate = learning_rate(c, state.step)
            state.optimizer.set_learning_rate(rate)
            with task.counted(sent):
                state.optimizer.step()
            state.optimizer.zero_grad()
            state.ema.update(state.model, state.step)
            state.step += 1
            state.clips += len(losses)
            window += 1
            for _, _, num_rows, size in fetched:
                tokens, flops = task.work(size and tuple(size))
                worked = [a + num_rows * b for a, b in zip(worked, (1, tokens, flops), strict=True)]
            watch.lap("update")

            if sent is not None:
                reporter.speed({"step": state.step, "communication": exchange(sent.as_dict())})

            record = {"step": state.step, "clips": state.clips, "loss": loss, "grad_norm": norm_value, "lr": rate}
            lost = {"skipped": skipped} if skipped else {}
            reporter.record({**record, **parts, "keys": keys, **lost})
            last = state.step == c.steps
            if last or state.step % c.log_every == 0:
                steps, window, done, worked = window, 0, [total / window for total in worked], [0, 0, 0.0]
                spent = watch.take(steps)
                sections = {f"{name}_s": spent.get(name, 0.0) for name in ("data", "compute", "update", "log")}
                seconds = sum(sections.values())
                speed = {"clips_per_s": done[0] / seconds, "data_wait": sections["data_s"] / seconds}
                speed["tokens_per_s"] = done[1] / seconds
                if done[2] and peak_flops:
                    speed["mfu"] = done[2] / seconds / (peak_flops * resolved.num_ranks)
                busy = exchange(watch.busy_s() / steps)
                row = {"step": state.step, "step_s": seconds, **sections, **speed}
                if len(busy) > 1:
                    row |= {"slowest_rank": busy.index(max(busy)), "busy_s": max(busy), "mean_busy_s": fmean(busy)}
                reporter.speed(row)
                scalars = {"train/loss": loss, "train/grad_norm": norm_value, "train/lr": rate, **speed}
                reporter.scalars(state.step, scalars)
                if any(quantiles):
                    reporter.histogram(state.step, "train/loss_by_timestep", quantiles, losses, c.num_time_bands)
                status = [f"loss {loss:.4f}", f"norm {norm_value:.3f}", f"{speed['clips_per_s']:.1f} clips/s"]
                status += [f"{speed['tokens_per_s']:.0f} tokens/s"]
                status += [f"MFU {speed['mfu']:.0%}"] if "mfu" in speed else []
                status += [f"data wait {speed['data_wait']:.1%}"]
                reporter.progress(state.step, "  ".join(status), last or state.step % (10 * c.log_every) == 0)

            watch.lap("log")

            if last or state.step % c.checkpoint_every == 0:
                save()
            beat(state.step, "review")
            try:
                review(state.step)
            except Exception as error:
                leave_after(error)
                raise
            watch.lap("review")
    except StoppedError:
        leave()
        return False
    state.finish()
    return True


def flat(told: list[Any]) -> list[float]:
    """The losses among what one data rank tells of its micro-batches."""
    return [value for values, _, _ in told for value in values]
