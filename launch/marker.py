"""How a start of a run ended, for the script or the driver that started it: RUN/stopped.json and RUN/failed.json.

Exit codes do not say it: under `srun --kill-on-bad-exit` they are of the process that was killed last. `attempt` names
the start (submission / job . restart), so the word of a rank that lives on where its node is lost is not taken for that
of the start that replaced it. The second file says that the start failed of what would come again: a config, a loss
that is not finite (`parallel.failure.Report.retry`).
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parallel.failure import report_of
from vidit.whole_file import write_whole

FILE, FAILED, ATTEMPT = "stopped.json", "failed.json", "VIDIT_ATTEMPT"


class Marker:
    """Writes the file, when the run has been left with everything saved."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir

    def __call__(self, step: int, done: bool, signal: str | None) -> None:
        """One line; the order of the first two keys is what job scripts look for."""
        facts = {"attempt": os.environ.get(ATTEMPT, ""), "done": done, "step": step, "signal": signal}
        write_whole(self.run_dir / FILE, json.dumps(facts) + "\n")


@contextmanager
def failures_noted(run_dir: Path) -> Iterator[None]:
    """Write the second file where the block fails in a job of what would come again."""
    try:
        yield
    except Exception as error:
        report, attempt = report_of(error, 0), os.environ.get(ATTEMPT)
        if attempt and not report.retry and run_dir.is_dir():
            facts = {"attempt": attempt, "retry": False, "message": report.message}
            write_whole(run_dir / FAILED, json.dumps(facts) + "\n")
        raise


def is_done(run_dir: Path, attempt: str) -> bool:
    """Whether that start left the run done."""
    facts = _facts(run_dir / FILE)
    return facts.get("attempt") == attempt and facts.get("done") is True


def fails_again(run_dir: Path, attempt: str) -> bool:
    """Whether that start failed of what would come again."""
    facts = _facts(run_dir / FAILED)
    return facts.get("attempt") == attempt and facts.get("retry") is False


def _facts(path: Path) -> dict[str, Any]:
    """What the file says; nothing where it is not there, or no such file."""
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
