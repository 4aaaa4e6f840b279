"""RUN/costs.jsonl: wall time, peak memory and step of each start of each stage, of those that failed too."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidit.train.memory import PeakMemory
from vidit.whole_file import read_rows, write_whole

COSTS = "costs.jsonl"


@dataclass
class Start:
    """One start of a stage; whoever runs it sets the step that it reached."""

    step: int = 0


@contextmanager
def costed(run_dir: Path, stage: str) -> Iterator[Start]:
    """Measure what is done inside, and add its row however it ends."""
    started, start = time.time(), Start()
    memory = PeakMemory()
    try:
        with memory:
            yield start
    finally:
        row = {"stage": stage, "step": start.step, "seconds": round(time.time() - started, 3)}
        rows = [*read_costs(run_dir), row | {"peak_rss_gib": round(memory.peak_gib, 4)}]
        write_whole(run_dir / COSTS, "".join(json.dumps(row) + "\n" for row in rows))


def read_costs(run_dir: Path) -> list[dict[str, Any]]:
    """Every whole row, oldest first."""
    return read_rows(run_dir / COSTS)
