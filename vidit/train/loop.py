"""The training loop: one function, its sections in a fixed order, for every task.

fetch -> noise, forward, backward -> check -> clip -> update -> average -> log -> validate, sample, save ->
maybe stop. What differs between tasks is the step function that is passed in.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vidit.config import RunConfig, resolve
from vidit.data.loader import Batch
from vidit.train.metrics import Reporter, Stopwatch
from vidit.train.optim import clip_gradients, gradient_norm, learning_rate, set_learning_rate
from vidit.train.state import TrainState
from vidit.train.step import Step
from vidit.train.stop import StopRequest
from vidit.train.validation import validate


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not finite; the update was not made."""


class SkipLimitError(RuntimeError):
    """More clips failed than `data.max_skipped` allows."""


class SkipCount:
    """Counts the clips that could not be used, and stops the run beyond the limit."""

    def __init__(self, limit: float, reporter: Reporter):
        self.limit, self.reporter, self.seen, self.skipped = limit, reporter, 0, 0

    def add(self, used: Sequence[str], skipped: Sequence[tuple[str, str]]) -> None:
        """Count the keys of good clips and the (key, reason) of others; SkipLimitError when too many have failed.

        One is always forgiven, so that the first batches are not judged by a fraction.
        """
        self.seen += len(used) + len(skipped)
        self.skipped += len(skipped)
        for key, reason in skipped:
            self.reporter.say(f"skipped clip {key}: {reason}")
        if self.skipped > max(1.0, self.limit * self.seen):
            key, reason = skipped[-1]
            raise SkipLimitError(
                f"{self.skipped} of {self.seen} clips could not be used, more than data.max_skipped="
                f"{self.limit:g} allows; the last: {key}: {reason}. Pack the dataset again, or raise data.max_skipped"
            )


def train_loop(
    config: RunConfig,
    state: TrainState,
    step: Step,
    data: Iterator[Batch],
    validation: list[Batch],
    reporter: Reporter,
    stop: StopRequest,
    checkpoints: Path,
    flops_per_step: float,
    peak_flops: float,
    preview: Callable[[int], None],
) -> bool:
    """Train `state` to `train.steps`, in place. True when done, False when a signal asked to leave.

    Every way out but an error leaves a checkpoint of the last step. Raises NonFiniteError before a bad
    update, naming the clips of the batch, and SkipLimitError.
    """
    c, accumulation = config.train, resolve(config).accumulation
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    skips = SkipCount(config.data.max_skipped, reporter)
    watch, window = Stopwatch(), 0
    saved_step = state.step
    state.model.train()

    while state.step < c.steps and stop.signal is None:
        keys: list[str] = []
        skipped: list[str] = []
        losses: list[float] = []
        quantiles: list[float] = []
        parts: dict[str, float] = {}
        for _ in range(accumulation):
            batch = next(data)
            skips.add(batch.keys, batch.skipped)
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
        set_learning_rate(state.optimizer, rate)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.ema.update(state.model, state.step)
        state.step += 1
        state.clips += c.global_batch
        window += 1
        watch.lap("update")

        record = {"step": state.step, "clips": state.clips, "loss": loss, "grad_norm": norm_value, "lr": rate}
        reporter.record({**record, **parts, "keys": keys, **({"skipped": skipped} if skipped else {})})
        if state.step % c.log_every == 0 or state.step == c.steps:
            spent, window = watch.take(window), 0
            seconds = spent["data"] + spent["compute"] + spent["update"]
            wait = spent["data"] / seconds
            mfu = flops_per_step / seconds / peak_flops
            speed = {"clips_per_s": c.global_batch / seconds, "mfu": mfu, "data_wait": wait}
            reporter.speed({"step": state.step, "step_s": seconds, **speed})
            reporter.scalars(state.step, {"train/loss": loss, "train/grad_norm": norm_value, "train/lr": rate, **speed})
            if any(quantiles):
                reporter.histogram(state.step, "train/loss_by_timestep", quantiles, losses, config.train.num_time_bands)
            tokens = c.global_batch * resolve(config).tokens_per_clip / seconds
            status = (
                f"loss {loss:.4f}  norm {norm_value:.3f}  {speed['clips_per_s']:.1f} clips/s  {tokens:.0f} tokens/s"
            )
            line = state.step % (10 * c.log_every) == 0 or state.step == c.steps
            reporter.progress(state.step, f"{status}  MFU {mfu:.0%}  data wait {wait:.1%}", line)

        last = state.step == c.steps
        if validation and (last or state.step % c.validate_every == 0):
            values = validate(state.model, state.ema, step, validation, c.num_time_bands)
            reporter.scalars(state.step, {f"validation/{name}": value for name, value in values.items()})
            reporter.record({"step": state.step, "validation": values})
            reporter.say(f"step {state.step} validation loss {values['loss']:.4f}")
        if c.sample_every and state.step % c.sample_every == 0:
            preview(state.step)
        if last or state.step % c.checkpoint_every == 0:
            state.save(checkpoints, facts(config), c.keep_checkpoints)
            saved_step = state.step
        watch.lap("other")

    if state.step > saved_step:
        state.save(checkpoints, facts(config), c.keep_checkpoints)
    return state.step >= c.steps


def facts(config: RunConfig) -> dict[str, object]:
    """What a checkpoint says of the run that wrote it."""
    return {"name": config.name, "config": config.model_dump(mode="json")}
