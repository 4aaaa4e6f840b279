"""The local back-end: a job is a script on this machine, detached from who submits it.

It keeps what a cluster would: an id, output, a state, a way to cancel. The id is the process and when it began, so a
process that got the same number later is not taken for it.
"""

import os
import shlex
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from launch.backend import TaskState
from launch.job import JobSpec
from launch.rank import is_held
from launch.site import Site

OUTPUT, CODE = "output.log", "exit-code"
SCRIPT = """\
#!/bin/bash
# {title}
# Written by `vidit submit local`; it may be run by hand.
cd -- {workdir} || exit 1
export VIDIT_ATTEMPT={submission}/$$.0 PYTHONPATH={source}:$PWD PYTHONSAFEPATH=1
again=yes child='' asked=''
trap 'asked=yes again=yes; [ -z "$child" ] || kill -TERM "$child"' TERM INT
{command} &
child=$!
[ -z "$asked" ] || kill -TERM "$child"
while [ "$again" ]; do
  again=''
  wait "$child"
  rc=$?
done
echo "$rc" >{code}
exit "$rc"
"""


class Backend:
    """Jobs on this machine (launch/backend.py has the contract)."""

    def faults(self, spec: JobSpec, site: Site) -> Iterator[str]:
        if spec.nodes > 1:
            yield f"--nodes={spec.nodes}: back-end local has this machine only; use slurm"
        if len(spec.tasks) > 1:
            yield f"--array has {len(spec.tasks)} runs, and back-end local would start all at once; use slurm"
        for name, value, default in (
            ("time", spec.minutes, None), ("site", spec.site, ""), ("after", spec.after, ()), ("chain", spec.chain, 1),
            ("restarts", spec.restarts, 0), ("sbatch", spec.options, ()), ("ranks", spec.ranks, "node"),
            ("min-nodes", spec.min_nodes, None), ("address", spec.address, ""),
        ):  # fmt: skip
            if value != default:
                yield f"--{name} has no effect with back-end local; leave it out"
        if ":" in spec.workdir + spec.tasks[0].run_dir:
            yield "':' is in the path of the run or of the working directory, and PYTHONPATH does not take that"

    def render(self, spec: JobSpec, site: Site, folder: Path) -> str:
        return SCRIPT.format(
            title=f"{spec.name}: {spec.devices} ranks on this machine",
            workdir=shlex.quote(spec.workdir),
            submission=folder.name,
            source=shlex.quote(str(folder / "source")),
            command=shlex.join(spec.command(spec.tasks[0])),
            code=shlex.quote(str(folder / CODE)),
        )

    def argv(self, spec: JobSpec, script: Path, after: Sequence[str] = ()) -> list[str]:
        return ["bash", str(script)]

    def submit(self, spec: JobSpec, script: Path) -> tuple[str, ...]:
        with (script.parent / OUTPUT).open("ab") as out:
            process = subprocess.Popen(
                self.argv(spec, script), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        return (f"{process.pid}-{_began(process.pid)}",)

    def status(self, ids: Sequence[str], folder: Path) -> list[TaskState]:
        (job,) = ids
        if _is_alive(job):
            return [TaskState(job, "running")]
        if _outlived(job, folder):
            return [TaskState(job, "running", "without its script, which was killed")]
        if not (folder / CODE).is_file():
            return [TaskState(job, "failed", "killed, or the machine went down")]
        code = (folder / CODE).read_text().strip()
        return [TaskState(job, "failed" if code != "0" else "done", f"exit code {code}")]

    def logs(self, ids: Sequence[str], folder: Path) -> list[Path]:
        return [folder / OUTPUT] if (folder / OUTPUT).is_file() else []

    def cancel(self, ids: Sequence[str], folder: Path) -> None:
        (job,) = ids
        process = int(job.partition("-")[0])
        with suppress(ProcessLookupError):
            if _is_alive(job):
                os.kill(process, signal.SIGTERM)
            elif _outlived(job, folder):
                os.killpg(process, signal.SIGTERM)


def _began(process: int) -> str:
    """When a process began, in ticks since the machine did; empty where it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _outlived(job: str, folder: Path) -> bool:
    """Whether what the script started is still there without it: its group of processes, and the lock of the run."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(int(job.partition("-")[0]), 0)
        return is_held(folder.parents[1] / "lock")
    return False


def _is_alive(job: str) -> bool:
    process, _, began = job.partition("-")
    return bool(began) and _began(int(process)) == began
