"""RUN/jobs/NNN: what was submitted, kept where it can be read. One folder for each submission of a run.

job.json         the description of the job, its back-end, its ids, the command that submitted it
job.sh           the script, as it was submitted
config.json      the resolved config of every task, in their order
source/          the code, as it was (`launch/snapshot.py`)
"""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field, ValidationError

from launch.job import JobSpec
from vidit.config import RunConfig, Section
from vidit.whole_file import write_whole

SCRIPT, RECORD = "job.sh", "job.json"
NUMBER = re.compile(r"\d{3,}")


class Submitted(Section):
    """A submission, as job.json holds it."""

    backend: str
    ids: tuple[str, ...] = Field(min_length=1)
    argv: tuple[str, ...]
    time: float
    spec: JobSpec


def folders(run_dir: Path) -> Iterator[Path]:
    """The folders of all submissions of a run, oldest first."""
    yield from sorted(
        (path for path in (run_dir / "jobs").glob("*") if NUMBER.fullmatch(path.name)), key=lambda path: int(path.name)
    )


def next_folder(run_dir: Path) -> Path:
    """Where the next submission goes; it is not made."""
    numbers = [int(path.name) for path in folders(run_dir)]
    return run_dir / "jobs" / f"{max(numbers, default=0) + 1:03d}"


def keep(folder: Path, script: str, configs: list[RunConfig]) -> Path:
    """Make the folder and write what is known before anything is submitted; the script. RuntimeError if it exists."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise RuntimeError(f"{folder} has just been made by another submission of the same run; try again") from error
    dumps = [config.model_dump(mode="json") for config in configs]
    write_whole(folder / "config.json", json.dumps(dumps[0] if len(dumps) == 1 else dumps, indent=1) + "\n")
    path = folder / SCRIPT
    write_whole(path, script)
    path.chmod(0o755)
    return path


def record(folder: Path, backend: str, spec: JobSpec, argv: list[str], ids: tuple[str, ...]) -> Submitted:
    """Write job.json, which makes the folder a submission."""
    submitted = Submitted(backend=backend, ids=ids, argv=tuple(argv), time=time.time(), spec=spec)
    write_whole(folder / RECORD, submitted.model_dump_json(indent=1) + "\n")
    return submitted


def newest(run_dir: Path) -> tuple[Path, Submitted]:
    """The last submission of a run. ValueError where there is none."""
    for folder in reversed(list(folders(run_dir))):
        if (folder / RECORD).is_file():
            try:
                return folder, Submitted.model_validate_json((folder / RECORD).read_text())
            except ValidationError as error:
                raise ValueError(f"{folder / 'job.json'} is damaged or of another version: {error}") from error
    raise ValueError(f"{run_dir} has no submitted job: it holds no jobs/*/job.json; `vidit submit` makes one")
