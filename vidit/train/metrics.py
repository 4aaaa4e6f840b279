"""What a run reports: metrics.jsonl, TensorBoard, a progress bar.

`metrics.jsonl` holds one line a step, and on resume every line after the checkpoint's step is dropped, so
the file always reads as one uninterrupted run.
"""

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from vidit.whole_file import read_rows, write_whole

METRICS = "metrics.jsonl"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Every whole line of a run's metrics.jsonl, in order."""
    return read_rows(run_dir / METRICS)


def rewind(run_dir: Path, step: int) -> None:
    """Drop the records and the samples of steps after `step`: they are about to be run again."""
    for folder in (run_dir / "samples").glob("step-*"):
        number = folder.name.removeprefix("step-")
        if number.isdigit() and int(number) > step:
            shutil.rmtree(folder)
    path = run_dir / METRICS
    if path.is_file():
        kept = [row for row in read_metrics(run_dir) if row["step"] <= step]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))


class Reporter:
    """Writes the records of a run; use as a context manager."""

    def __init__(self, run_dir: Path, total_steps: int, start_step: int):
        self._run_dir = run_dir
        self._speed = run_dir / "speed.jsonl"
        self._open(start_step)
        self._console = Console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} {task.fields[facts]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=start_step, facts="")
        self._total = total_steps

    def _open(self, step: int) -> None:
        self._file = (self._run_dir / METRICS).open("a", buffering=1)
        self._board = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=step + 1)

    def rewind(self, step: int) -> None:
        """Drop what was recorded of the steps after `step`."""
        self._board.close()
        self._file.close()
        rewind(self._run_dir, step)
        self._open(step)

    def __enter__(self) -> "Reporter":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._board.close()
        self.sync()
        self._file.close()

    def say(self, text: str) -> None:
        """A line for the person at the terminal."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def record(self, row: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        self._file.write(json.dumps(row) + "\n")

    def sync(self) -> None:
        """Bring metrics.jsonl to the disk: a checkpoint must not know of a step that the file has lost."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def speed(self, row: Mapping[str, Any]) -> None:
        """One line of speed.jsonl: where the time of the last steps went. Apart, since no two runs agree on it."""
        with self._speed.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers for TensorBoard."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def histogram(self, step: int, name: str, quantiles: list[float], losses: list[float], bands: int) -> None:
        """The loss by timestep band: each band weighs as much as its summed loss."""
        counts, edges = np.histogram(quantiles, bins=bands, range=(0.0, 1.0), weights=losses)
        self._board.add_histogram_raw(
            name, 0.0, 1.0, len(quantiles), float(sum(losses)), float(np.square(losses).sum()),
            edges[1:].tolist(), counts.tolist(), step,
        )  # fmt: skip

    def video(self, step: int, name: str, video_THW3: torch.Tensor, fps: float) -> None:
        """A video for TensorBoard, as an animated GIF."""
        from vidit.train.board import add_video

        add_video(self._board, name, video_THW3.numpy(), step, fps)

    def progress(self, step: int, facts: str, line: bool) -> None:
        """Move the bar; where there is no terminal, print a line when asked."""
        self._progress.update(self._task, completed=step, facts=facts)
        if line and not self._console.is_terminal:
            self.say(f"step {step}/{self._total} {facts}")


class SilentReporter(Reporter):
    """Of the ranks that do not report: one of a run does, for all."""

    def __init__(self) -> None:
        pass

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def rewind(self, step: int) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def record(self, row: Mapping[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass

    def speed(self, row: Mapping[str, Any]) -> None:
        pass

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def histogram(self, step: int, name: str, quantiles: list[float], losses: list[float], bands: int) -> None:
        pass

    def video(self, step: int, name: str, video_THW3: torch.Tensor, fps: float) -> None:
        pass

    def progress(self, step: int, facts: str, line: bool) -> None:
        pass


class Stopwatch:
    """Seconds spent in each section of the loop, since the last `take` and since the beginning (`totals`)."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        self._spent: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, section: str) -> float:
        """Charge the time since the last lap to a section; returns it."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        for sums in (self._spent, self.totals):
            sums[section] = sums.get(section, 0.0) + seconds
        return seconds

    def take(self, steps: int) -> dict[str, float]:
        """Seconds a step by section, over the `steps` since the last call."""
        spent, self._spent = self._spent, {}
        return {section: seconds / steps for section, seconds in spent.items()}
