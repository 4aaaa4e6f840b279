"""Ray as a back-end: a job is a driver (`launch/ray_driver.py`) that Ray's job server starts on the head of a cluster.

Submitted with `ray job submit`; how it is and how it is stopped goes through Ray's client of the same server. Ray is
imported when it is asked. A run of a sweep is a job of its own: none waits for another's nodes.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import folder as folders
from launch.backend import State, TaskState
from launch.job import JobSpec
from launch.ray_order import OUTPUT, Order
from launch.site import Site, read_site

STATES: dict[str, State] = {
    "PENDING": "pending", "RUNNING": "running", "STOPPED": "cancelled", "SUCCEEDED": "done", "FAILED": "failed",
}  # fmt: skip
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
PYTHON = ("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUNBUFFERED")
MORE_S = 60  # after the grace of the ranks: for the driver itself, before Ray kills it
SUBMIT_S = 120.0
ID = re.compile(r"Job '([^']+)' submitted")
ERROR = re.compile(r"[\w.]*(Error|Exception): ")
SCRIPT = """\
#!/bin/bash
# {title}
# Written by `vidit submit ray`. By hand, on a node of the cluster: bash {script} [number of the run]
cd -- {workdir} || exit 1
export PYTHONPATH={source}:$PWD PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
{exports}case ${{1:-0}} in
{tasks}*)
  echo "there is no run $1 in this job" >&2
  exit 2
  ;;
esac
"""
TASK = """\
{number})
  exec {command}
  ;;
"""


class Backend:
    """Jobs on a Ray cluster (launch/backend.py has the contract)."""

    def faults(self, spec: JobSpec, site: Site) -> Iterator[str]:
        if not _address(spec, site, os.environ):
            yield (
                "no address of Ray's job server: give --address http://HEAD:8265, ray.address of the site, or set "
                f"{ADDRESSES[0]}"
            )
        if spec.min_nodes is not None and spec.min_nodes >= spec.nodes:
            yield (
                f"--min-nodes={spec.min_nodes} has no effect with --nodes={spec.nodes}: it must be less; leave it out "
                "to train on all nodes only"
            )
        if site.devices and spec.devices > site.devices:
            yield f"--devices={spec.devices}: a node of site {spec.site} has {site.devices}; use at most that many"
        for name, value, default, why in (
            ("time", spec.minutes, None, "Ray ends no job"), ("after", spec.after, (), "Ray's jobs have no order"),
            ("chain", spec.chain, 1, "the driver itself starts again"), ("sbatch", spec.options, (), "that is SLURM's"),
            ("ranks", spec.ranks, "device", "an actor starts the ranks of its node"),
        ):  # fmt: skip
            if value != default:
                yield f"--{name} has no effect with back-end ray: {why}; leave it out"
        for name in ("minutes", "modules", "setup", "keep", "container", "health"):
            if getattr(site, name) != getattr(Site(), name):
                yield f"{name} of site {spec.site} has no effect with back-end ray: nodes come as Ray has set them up"
        if any(":" in path or "\n" in path for path in (spec.workdir, *(task.run_dir for task in spec.tasks))):
            yield "':' or a line break is in the path of the run or of the working directory: PYTHONPATH takes neither"

    def render(self, spec: JobSpec, site: Site, folder: Path) -> str:
        orders = [_order(spec, site, folder, number) for number in range(len(spec.tasks))]
        return SCRIPT.format(
            title=f"{spec.name}: {spec.num_ranks} ranks, {spec.nodes} nodes of {spec.devices} devices",
            script=shlex.quote(str(folder / folders.SCRIPT)),
            workdir=shlex.quote(spec.workdir),
            source=shlex.quote(str(folder / "source")),
            exports="".join(f"export {name}={shlex.quote(value)}\n" for name, value in site.environment.items()),
            tasks="".join(
                TASK.format(number=order.task, command=shlex.join([spec.python, *order.words()])) for order in orders
            ),
        )

    def argv(self, spec: JobSpec, script: Path, after: Sequence[str] = ()) -> list[str]:
        return _argv(spec, script, 0)

    def submit(self, spec: JobSpec, script: Path) -> tuple[str, ...]:
        ids: list[str] = []
        address = _address(spec, read_site(spec.site), os.environ)
        try:
            for task in range(len(spec.tasks)):
                ids.append(_submit(_argv(spec, script, task), address))
        except RuntimeError:
            for job in ids:
                _client(address).stop_job(job)
            raise
        return tuple(ids)

    def status(self, ids: Sequence[str], folder: Path) -> list[TaskState]:
        client = _client(_kept_address(folder))
        return [_state(client, job, folder / OUTPUT.format(task)) for task, job in enumerate(ids)]

    def logs(self, ids: Sequence[str], folder: Path) -> list[Path]:
        paths = [folder / OUTPUT.format(task) for task in range(len(ids))]
        return [path for path in paths if path.is_file()]

    def cancel(self, ids: Sequence[str], folder: Path) -> None:
        client = _client(_kept_address(folder))
        for task, job in enumerate(ids):
            if not _state(client, job, folder / OUTPUT.format(task)).is_over:
                client.stop_job(job)


def _order(spec: JobSpec, site: Site, folder: Path, number: int) -> Order:
    task, ray = spec.tasks[number], site.ray
    return Order(
        folder=folder, task=number, run_dir=Path(task.run_dir), nodes=spec.nodes, devices=spec.devices,
        min_nodes=spec.nodes if spec.min_nodes is None else spec.min_nodes, device=ray.device,
        cpus_per_device=ray.cpus_per_device, restarts=spec.restarts, wait_s=ray.wait_s, settle_s=ray.settle_s,
        grace_s=ray.grace_s, exports=(*PYTHON, *site.environment), command=tuple(spec.command(task)),
    )  # fmt: skip


def _address(spec: JobSpec, site: Site, environment: Mapping[str, str]) -> str:
    """Of the job server; empty where nobody says."""
    given = [spec.address, site.ray.address or "", *(environment.get(name, "") for name in ADDRESSES)]
    return next(filter(None, given), "")


def _argv(spec: JobSpec, script: Path, task: int) -> list[str]:
    """`ray job submit`. Ray kills what it stops after 3 s unless its supervisor of the job is told otherwise."""
    site = read_site(spec.site)
    patience = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(site.ray.grace_s + MORE_S)}}
    name = spec.name if len(spec.tasks) == 1 else f"{spec.name}/{task}"
    return [
        "ray", "job", "submit", f"--address={_address(spec, site, os.environ)}", "--no-wait",
        f"--metadata-json={json.dumps({'job_name': name})}", f"--runtime-env-json={json.dumps(patience)}",
        "--", "bash", str(script), str(task),
    ]  # fmt: skip


def _submit(argv: Sequence[str], address: str) -> str:
    """The id that Ray gives a job. RuntimeError with what Ray says where it takes none.

    The address is set in the environment too: to Ray that counts more than its own option.
    """
    environment = {**os.environ, ADDRESSES[0]: address}
    beside = Path(sys.executable).with_name(argv[0])
    program = str(beside) if beside.is_file() else shutil.which(argv[0])
    if program is None:
        raise RuntimeError("no command ray; run `pip install -e '.[ray]'` in the clone, in the cluster's version")
    try:
        done = subprocess.run([program, *argv[1:]], env=environment, capture_output=True, text=True, timeout=SUBMIT_S)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"`ray job submit` has not ended in {SUBMIT_S:g} s; is {argv[3]} right?") from error
    found = ID.search(done.stdout + done.stderr)
    if done.returncode or not found:
        said = [line for line in (done.stderr or done.stdout).splitlines() if any(map(str.isalpha, line))]
        errors = [line for line in said if ERROR.match(line)]
        raise RuntimeError(f"ray job submit: {[f'exit code {done.returncode}', *said, *errors][-1]}")
    return found[1]


def _client(address: str) -> Any:
    """Ray's own client of a job server, whatever address the environment has. RuntimeError where it does not answer."""
    try:
        from ray.exceptions import RayError
        from ray.job_submission import JobSubmissionClient
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{error.name} is not installed; run `pip install -e '.[ray]'` in the clone") from error
    before = os.environ.get(ADDRESSES[0])
    os.environ[ADDRESSES[0]] = address
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, RayError) as error:
        raise RuntimeError(f"the job server of Ray at {address} does not answer: {error}") from error
    finally:
        del os.environ[ADDRESSES[0]]
        if before is not None:
            os.environ[ADDRESSES[0]] = before


def _kept_address(folder: Path) -> str:
    """That of the submission, whatever the environment says now."""
    submitted = folders.Submitted.model_validate_json((folder / "job.json").read_text())
    (address,) = [word.partition("=")[2] for word in submitted.argv if word.startswith("--address=")]
    return address


def _state(client: Any, job: str, output: Path) -> TaskState:
    try:
        info = client.get_job_info(job)
    except RuntimeError as error:
        if "404" not in str(error):
            raise
        return TaskState(job, "unknown", "the cluster knows no such job: it has been started anew since")
    word = str(info.status.value if hasattr(info.status, "value") else info.status)
    last = _last_word(output)
    detail = [word.lower(), last or (str(info.message).partition("\n")[0] if word == "FAILED" else "")]
    return TaskState(job, STATES.get(word, "unknown"), ", ".join(filter(None, detail)))


def _last_word(output: Path) -> str:
    """The driver's last line."""
    try:
        lines = [line for line in output.read_text(errors="replace").splitlines() if line.startswith("ray: ")]
    except OSError:
        return ""
    return lines[-1].removeprefix("ray: ") if lines else ""
