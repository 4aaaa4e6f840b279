"""RUN/stopped.json: how a start of a run ended, for the script that started it.

Exit codes do not say it: under `srun --kill-on-bad-exit` they are of the process that was killed last, and torchrun
ends with 1 after every signal. `attempt` names the start (submission / job . restart), so the word of a rank that lives
on where its node is lost is not taken for that of the start that replaced it.
"""

import json
import os
from pathlib import Path

from vidit.whole_file import write_whole

FILE, ATTEMPT = "stopped.json", "VIDIT_ATTEMPT"


class Marker:
    """Writes the file, when the run has been left with everything saved."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir

    def __call__(self, step: int, done: bool, signal: str | None) -> None:
        """One line; the order of the first two keys is what job scripts look for."""
        facts = {"attempt": os.environ.get(ATTEMPT, ""), "done": done, "step": step, "signal": signal}
        write_whole(self.run_dir / FILE, json.dumps(facts) + "\n")
