"""What every back-end can do with a job: render its script, submit it, say how it is, find its output, cancel it.

`render` is pure text, so that it can be read, compared and run by hand; `submit` and the others run lists of words,
never a line for a shell. A back-end is one module with a class `Backend`; it is imported when it is asked for.
"""

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, cast

from launch import BACKENDS
from launch.job import JobSpec
from launch.site import Site

State = Literal["pending", "running", "done", "failed", "cancelled", "unknown"]


@dataclass(frozen=True)
class TaskState:
    """How one job, or one task of an array, is: `detail` is what the back-end itself says of it."""

    id: str
    state: State
    detail: str = ""

    @property
    def is_over(self) -> bool:
        return self.state not in ("pending", "running")


class Backend(Protocol):
    """`folder` is that of the submission (`launch/folder.py`); its script, code and output lie there."""

    def faults(self, spec: JobSpec, site: Site) -> Iterator[str]:
        """What keeps a job from running there, one line each."""
        ...

    def render(self, spec: JobSpec, site: Site, folder: Path) -> str:
        """The script of the job. Pure: the same text for the same arguments, wherever it is called."""
        ...

    def argv(self, spec: JobSpec, script: Path, after: Sequence[str] = ()) -> list[str]:
        """The command that submits the script; `after` are earlier jobs of the same chain."""
        ...

    def submit(self, spec: JobSpec, script: Path) -> tuple[str, ...]:
        """Submit it, one job for each link of its chain; the ids. RuntimeError where the back-end refuses."""
        ...

    def status(self, ids: Sequence[str], folder: Path) -> list[TaskState]:
        """One entry a task, newest knowledge first where several sources know it."""
        ...

    def logs(self, ids: Sequence[str], folder: Path) -> list[Path]:
        """The files that hold the output, in the order of the tasks; only those that exist."""
        ...

    def cancel(self, ids: Sequence[str], folder: Path) -> None:
        """Ask every task to save and leave, and to be gone after the site's grace. No error where all are over."""
        ...


def load_backend(name: str) -> Backend:
    """The back-end of that name; ValueError naming those that there are."""
    if name not in BACKENDS:
        raise ValueError(f"no back-end {name!r}; there are {' '.join(BACKENDS)}")
    return cast(Backend, importlib.import_module(BACKENDS[name]).Backend())
