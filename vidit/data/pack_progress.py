"""How far a packing is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vidit.data.pack_verdicts import Tally, Watch

if TYPE_CHECKING:
    from rich.console import Console

LOG_EVERY_S = 20.0


def progress_line(tally: Tally, elapsed_s: float) -> str:
    """Clips, speed and the time that is left, in words; speed is of what this process decodes."""
    line = f"{tally.done}/{tally.total} clips, {tally.kept} kept, {tally.rejected} rejected"
    if not tally.decoded or elapsed_s <= 0:
        return line
    clips_hz = tally.decoded / elapsed_s
    left_s = round((tally.total - tally.done) / clips_hz)
    left = f"{left_s // 3600}:{left_s // 60 % 60:02d}:{left_s % 60:02d}"
    return f"{line}, {clips_hz:.1f} clips/s, {tally.decoded_bytes / elapsed_s / 2**20:.1f} MiB/s, {left} left"


@contextmanager
def progress(console: Console | None = None, log_every_s: float = LOG_EVERY_S) -> Iterator[Watch]:
    """What ``pack`` calls after each file: moves a bar where ``console`` (stdout) is a terminal, else prints lines."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = console or Console()
    begin_s = time.monotonic()
    if console.is_terminal:
        with Progress(BarColumn(None), TextColumn("{task.description}"), console=console, transient=True) as bar:
            task = bar.add_task("reading the source", total=None)

            def move(tally: Tally) -> None:
                line = progress_line(tally, time.monotonic() - begin_s)
                bar.update(task, total=tally.total, completed=tally.done, description=line)

            yield move
        return
    last_s = begin_s

    def log(tally: Tally) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if now_s - last_s >= log_every_s:
            last_s = now_s
            console.print(progress_line(tally, now_s - begin_s), highlight=False, soft_wrap=True)

    yield log
