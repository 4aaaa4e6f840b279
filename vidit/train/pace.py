"""How fast a run is: what `speed.jsonl`, TensorBoard and the progress line say of the steps since the last report."""

from dataclasses import dataclass, field
from typing import Any

from vidit.resolve import resolve
from vidit.train.fetch import Fetched
from vidit.train.metrics import Reporter, Stopwatch
from vidit.train.outcome import Outcome
from vidit.train.stragglers import Stragglers
from vidit.train.task import Task

SECTIONS = ("data", "compute", "update", "log")


@dataclass
class Pace:
    """Collects rows, tokens and FLOPs of steps; `report` tells of them. `peak_flops` of one device, where known."""

    task: Task
    reporter: Reporter
    watch: Stopwatch
    peak_flops: float | None
    steps: int = 0
    worked: list[float] = field(default_factory=lambda: [0, 0, 0.0])

    def __post_init__(self) -> None:
        self.stragglers = Stragglers(self.task.config.parallel.slow_rank)
        self.num_ranks = resolve(self.task.config).num_ranks
        self.most_tokens = self.task.config.data.packed_tokens * self.task.config.train.global_batch

    def add(self, fetched: Fetched, outcome: Outcome, update_s: float) -> None:
        """One step, whether or not it was updated."""
        self.steps += 1
        for rows, size in fetched.shapes:
            tokens, flops = self.task.work(size)
            self.worked = [a + rows * b for a, b in zip(self.worked, (1, tokens, flops), strict=True)]
        self.stragglers.add(fetched.own_s, outcome.own_s, update_s)

    def report(self, step: int, outcome: Outcome, norm: float, rate: float) -> None:
        """Collective."""
        rows, tokens, flops = (total / self.steps for total in self.worked)
        spent = self.watch.take(self.steps)
        self.steps, self.worked = 0, [0, 0, 0.0]
        sections = {f"{name}_s": spent.get(name, 0.0) for name in SECTIONS}
        seconds = sum(sections.values())
        speed = {"clips_per_s": rows / seconds, "data_wait": sections["data_s"] / seconds}
        speed["tokens_per_s"] = tokens / seconds
        if self.most_tokens:
            speed["fill"] = tokens / self.most_tokens
        if flops and self.peak_flops:
            speed["mfu"] = flops / seconds / (self.peak_flops * self.num_ranks)
        row: dict[str, Any] = {"step": step, "step_s": seconds, **sections, **speed}
        found = self.stragglers.compare()
        self.reporter.speed(row | (found.as_row() if found else {}))
        word = self.stragglers.word(found)
        if word:
            self.reporter.say(f"step {step}: {word}")
        scalars = {"train/loss": outcome.loss, "train/grad_norm": norm, "train/lr": rate}
        self.reporter.scalars(step, scalars | speed)
        c = self.task.config.train
        if outcome.finite and any(outcome.quantiles):
            name = "train/loss_by_timestep"
            self.reporter.histogram(step, name, outcome.quantiles, outcome.losses, c.num_time_bands)
        status = [f"loss {outcome.loss:.4f}", f"norm {norm:.3f}", f"{speed['clips_per_s']:.1f} clips/s"]
        status += [f"{speed['tokens_per_s']:.0f} tokens/s"]
        status += [f"{speed['fill']:.1%} of packed rows filled"] if "fill" in speed else []
        status += [f"MFU {speed['mfu']:.0%}"] if "mfu" in speed else []
        status += [f"data wait {speed['data_wait']:.1%}"]
        self.reporter.progress(step, "  ".join(status), step == c.steps or step % (10 * c.log_every) == 0)
