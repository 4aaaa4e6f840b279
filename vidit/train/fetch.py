"""The micro-batches of a step, and what all ranks tell one another of theirs before any of them computes."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from parallel.exchange import exchange, in_order, together
from vidit.data.loader import Batch, Size
from vidit.data.stream_plan import Mark
from vidit.train.clips import require_same_clips
from vidit.train.task import Task


@dataclass(frozen=True)
class Fetched:
    """This rank's micro-batches; of all ranks' the keys, the clips that were replaced, and (rows, size) of each.

    `marks` are those of the readers of a stream, in the order of their batches. `own_s` is what this rank took until it
    came to wait for the others.
    """

    batches: list[Batch]
    keys: list[str]
    skipped: list[tuple[str, str]]
    shapes: list[tuple[int, Size | None]]
    marks: list[Mark]
    own_s: float

    @property
    def num_rows(self) -> int:
        """Of the whole step."""
        return sum(rows for rows, _ in self.shapes)


def fetch(task: Task, data: Iterator[Batch], accumulation: int, step: int, arrived: Callable[[], None]) -> Fetched:
    """Collective. `arrived` is called where this rank has its batches and begins to wait for the others.

    Raises what reading raised, on every rank, and RuntimeError where ranks that share rows were given other clips.
    """
    began = time.perf_counter()
    with together():
        batches = [next(data) for _ in range(accumulation)]
        own_s = time.perf_counter() - began
        arrived()
    own: list[Any] = [[b.keys, b.skipped, b.shapes, b.mark and b.mark.told()] for b in batches]
    told = in_order(exchange(own, task.rows))
    require_same_clips(told, f"step {step}", task.config.data.train)
    return Fetched(
        batches=batches,
        keys=[key for used, *_ in told for key in used],
        skipped=[(key, reason) for _, lost, *_ in told for key, reason in lost],
        shapes=[(rows, tuple(size) if size else None) for _, _, shapes, _ in told for rows, size in shapes],
        marks=[Mark.heard(mark) for *_, mark in told if mark],
        own_s=own_s,
    )
