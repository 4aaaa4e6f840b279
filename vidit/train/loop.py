"""The training loop: one function, its sections in a fixed order, for every task.

fetch -> noise, forward, backward -> check -> clip -> update -> average -> log -> save -> review -> maybe stop.
What differs between tasks is the step function that is passed in.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vidit.config import RunConfig
from vidit.data.loader import Batch
from vidit.resolve import resolve
from vidit.train.metrics import Reporter, Stopwatch
from vidit.train.optim import clip_gradients, gradient_norm, learning_rate
from vidit.train.skips import SkipCount
from vidit.train.state import TrainState
from vidit.train.step import Step
from vidit.train.stop import StoppedError, StopRequest


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not finite; the update was not made."""


def train_loop(
    config: RunConfig,
    state: TrainState,
    step: Step,
    data: Iterator[Batch],
    review: Callable[[int], None],
    reporter: Reporter,
    stop: StopRequest,
    checkpoints: Path,
    facts: dict[str, Any],
    flops_per_step: float | None,
    peak_flops: float | None,
) -> bool:
    """Train `state` to `train.steps`, in place. True when done, False when a signal asked to leave.

    Every way out but an error of a step itself leaves a checkpoint of the step before. `review` looks at a step that is
    complete, validation and samples: it comes after the save, a failure in it loses nothing, and a resume
    begins with that of the step it resumes from. Raises NonFiniteError before a bad update, naming the clips of
    the batch, and SkipLimitError.
    """
    c, accumulation = config.train, resolve(config).accumulation
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    skips = SkipCount(config.data.max_skipped, reporter)
    watch, window = Stopwatch(), 0
    saved_step = state.step
    state.model.train()

    def save() -> None:
        nonlocal saved_step
        if state.step > saved_step:
            reporter.sync()
            state.save(checkpoints, facts, c.keep_checkpoints)
            saved_step = state.step

    try:
        if state.step:
            review(state.step)
        watch.lap("review")
        while state.step < c.steps:
            stop.check()
            keys: list[str] = []
            skipped: list[str] = []
            losses: list[float] = []
            quantiles: list[float] = []
            parts: dict[str, float] = {}
            for _ in range(accumulation):
                try:
                    batch = next(data)
                    skips.add(batch.keys, batch.skipped)
                except (ValueError, RuntimeError, OSError):
                    save()
                    raise
                watch.lap("data")
                result = step(state.model, batch, "train")
                (result.rows_B.mean() / accumulation).backward()
                keys += batch.keys
                skipped += [key for key, _ in batch.skipped]
                losses += result.rows_B.detach().tolist()
                quantiles += result.quantile_B.tolist()
                parts = {k: parts.get(k, 0.0) + v / accumulation for k, v in result.parts.items()}
                watch.lap("compute")

            loss = sum(losses) / len(losses)
            norm = gradient_norm(parameters)
            norm_value = float(norm)
            if not (math.isfinite(loss) and math.isfinite(norm_value)):
                raise NonFiniteError(
                    f"loss {loss} and gradient norm {norm_value} at step {state.step + 1}: not finite, no update made. "
                    f"Clips of the batch: {' '.join(keys)}. Look at them, lower train.learning_rate, or resume from "
                    "an earlier checkpoint"
                )
            clip_gradients(parameters, c.clip_norm, norm)

            rate = learning_rate(c, state.step)
            state.optimizer.set_learning_rate(rate)
            state.optimizer.step()
            state.optimizer.zero_grad()
            state.ema.update(state.model, state.step)
            state.step += 1
            state.clips += c.global_batch
            window += 1
            watch.lap("update")

            record = {"step": state.step, "clips": state.clips, "loss": loss, "grad_norm": norm_value, "lr": rate}
            reporter.record({**record, **parts, "keys": keys, **({"skipped": skipped} if skipped else {})})
            last = state.step == c.steps
            if last or state.step % c.log_every == 0:
                spent, window = watch.take(window), 0
                sections = {f"{name}_s": spent.get(name, 0.0) for name in ("data", "compute", "update", "log")}
                seconds = sum(sections.values())
                speed = {"clips_per_s": c.global_batch / seconds, "data_wait": sections["data_s"] / seconds}
                speed["tokens_per_s"] = speed["clips_per_s"] * resolve(config).tokens_per_clip
                if flops_per_step and peak_flops:
                    speed["mfu"] = flops_per_step / seconds / peak_flops
                reporter.speed({"step": state.step, "step_s": seconds, **sections, **speed})
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
            try:
                review(state.step)
            except Exception:
                save()
                raise
            watch.lap("review")
    except StoppedError:
        save()
        return False
    return True
