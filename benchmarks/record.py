"""Where a benchmark's answer goes: a dated JSON file with the environment it was measured in."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vidit.train.rundir import environment

RESULTS = Path(__file__).parent / "results"


def write_result(question: str, answer: Mapping[str, Any]) -> Path:
    """Write benchmarks/results/YYYY-MM-DD-<question>.json; returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{datetime.now(UTC).date().isoformat()}-{question}.json"
    measured_in = environment()
    # Where things lie on the machine is nobody's business: of a whole path the last name is kept.
    measured_in["command"] = [Path(word).name if Path(word).is_absolute() else word for word in measured_in["command"]]
    path.write_text(json.dumps({**answer, "environment": measured_in}, indent=1) + "\n")
    return path
