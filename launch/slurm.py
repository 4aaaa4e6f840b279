"""SLURM as a back-end: one sbatch script a job, and what squeue and scontrol say of it.

sacct is asked last, for jobs that slurmctld has forgotten, since many clusters have no accounting.
"""

import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch import sbatch
from launch.backend import State, TaskState
from launch.job import JobSpec
from launch.site import Site

STATES: dict[str, State] = {
    "PENDING": "pending", "CONFIGURING": "pending", "REQUEUED": "pending", "REQUEUE_HOLD": "pending",
    "REQUEUE_FED": "pending", "SPECIAL_EXIT": "pending", "RUNNING": "running", "COMPLETING": "running",
    "SUSPENDED": "running", "STOPPED": "running", "SIGNALING": "running", "STAGE_OUT": "running",
    "RESIZING": "running", "COMPLETED": "done", "CANCELLED": "cancelled", "FAILED": "failed", "TIMEOUT": "failed",
    "NODE_FAIL": "failed", "OUT_OF_MEMORY": "failed", "BOOT_FAIL": "failed", "DEADLINE": "failed",
    "PREEMPTED": "failed", "REVOKED": "failed",
}  # fmt: skip
FIELD = re.compile(r"(?:^| )(\w+)=(\S*)")
OWNER = re.compile(r" UserId=\S+\(\d+\) ")
TIMEOUT_S = 60.0


class SlurmError(RuntimeError):
    """SLURM refuses, or does not answer."""


def ask(*argv: str) -> str:
    """The output of one of SLURM's commands. RuntimeError with its own words where it fails."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S)
    except FileNotFoundError as error:
        raise SlurmError(f"no {argv[0]} on this machine; submit from a login node of the cluster") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"{argv[0]} has not answered in {TIMEOUT_S:g} s; is slurmctld up? See `scontrol ping`"
        ) from error
    if done.returncode:
        raise SlurmError(f"{argv[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


class Backend:
    """Jobs under SLURM (launch/backend.py has the contract)."""

    def faults(self, spec: JobSpec, site: Site) -> Iterator[str]:
        if not spec.site:
            yield "--site is missing: the cluster's name in cluster/sites, or a path to a .toml of yours"
        yield from sbatch.faults(spec, site)

    def render(self, spec: JobSpec, site: Site, folder: Path) -> str:
        return sbatch.render(spec, site, folder)

    def argv(self, spec: JobSpec, script: Path, after: Sequence[str] = ()) -> list[str]:
        waits = [f"afterok:{':'.join(spec.after)}"] if spec.after else []
        waits += [f"afterany:{':'.join(after)}"] if after else []
        more = [f"--dependency={','.join(waits)}", "--kill-on-invalid-dep=yes"] if waits else []
        return ["sbatch", "--parsable", *more, str(script)]

    def submit(self, spec: JobSpec, script: Path) -> tuple[str, ...]:
        ids: list[str] = []
        try:
            for _ in range(spec.chain):
                # --parsable gives ID or ID;CLUSTER
                ids.append(ask(*self.argv(spec, script, ids[-1:])).strip().partition(";")[0])
        except SlurmError:
            if ids:
                ask("scancel", *ids)
            raise
        return tuple(ids)

    def status(self, ids: Sequence[str], folder: Path) -> list[TaskState]:
        return [state for job in ids for state in _status(job)]

    def logs(self, ids: Sequence[str], folder: Path) -> list[Path]:
        return sorted(folder.glob("output-*.log"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])

    def cancel(self, ids: Sequence[str], folder: Path) -> None:
        left = [state.id for state in self.status(ids, folder) if not state.is_over]
        if left:
            ask("scancel", *left)


def _status(job: str) -> list[TaskState]:
    """The states of a job, one for each task of an array that has begun and one for the rest."""
    try:
        lines = ask("scontrol", "-o", "show", "job", job).splitlines()
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            raise
        return [_remembered(job)]
    return [_parsed(line) for line in lines if line.strip()]


def _parsed(line: str) -> TaskState:
    """Of a line of scontrol. Names and paths may hold anything: fields are looked for between the two."""
    head, _, rest = line.partition(" JobName=")
    rest = OWNER.split(rest, maxsplit=1)[-1]
    facts = dict(FIELD.findall(head)) | dict(reversed(FIELD.findall(rest)))
    job = facts["JobId"]
    if "ArrayJobId" in facts and "ArrayTaskId" in facts:
        job = f"{facts['ArrayJobId']}_{facts['ArrayTaskId']}"
    state, restarts, code = facts["JobState"], facts.get("Restarts", "0"), facts.get("ExitCode", "0:0")
    told = {"nodes": facts.get("NodeList", ""), "reason": facts.get("Reason", ""), "exit code": code.partition(":")[0]}
    if STATES.get(state) != "failed":
        del told["exit code"]
    if restarts != "0":
        told["restarts"] = restarts
    details = [state.lower(), *(f"{key} {value}" for key, value in told.items() if value not in ("", "None", "(null)"))]
    return TaskState(job, STATES.get(state, "unknown"), ", ".join([*details, facts.get("RunTime", "")]))


def _remembered(job: str) -> TaskState:
    """What accounting knows of a job that slurmctld has forgotten."""
    try:
        line = ask("sacct", "-X", "-n", "-P", "-o", "State,ExitCode", "-j", job).strip().splitlines()
    except SlurmError:
        line = []
    if not line:
        return TaskState(job, "unknown", "SLURM has forgotten it, and there is no accounting; stopped.json tells more")
    word, _, code = line[0].partition("|")
    return TaskState(job, STATES.get(word.split(" ")[0], "unknown"), f"{word.lower()}, exit code {code}")
