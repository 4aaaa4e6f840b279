"""`vidit submit`, `status`, `logs` and `cancel`: from words on the command line to a back-end and its answer as text.

Whatever is wrong is said before anything is submitted: faults of the config for that many ranks, of the job, of the
site, all at once.
"""

import argparse
import json
import shlex
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from launch import folder as folders
from launch import snapshot
from launch.backend import Backend, TaskState, load_backend
from launch.job import JobSpec, Task, parse_minutes
from launch.marker import FILE
from launch.site import Site, read_site
from vidit.config import ConfigError, RunConfig, refuse

Load = Callable[[Sequence[str]], RunConfig]
Check = Callable[[RunConfig, int, int], RunConfig]
POLL_S = 1.0


def submit(arguments: argparse.Namespace, load: Load, check: Check) -> str:
    """Submit a job, or say with --dry-run what would be. `load` takes more overrides, `check` (config, ranks, ranks
    of a node). ConfigError with every fault; RuntimeError where the back-end refuses or the run has a live job.
    """
    backend, site = load_backend(arguments.backend), read_site(arguments.site)
    base = load([]).directory.absolute()
    spec = _spec(arguments, site, base, _tasks(arguments.array, load, base))
    faults = list(backend.faults(spec, site))
    configs = []
    for number, task in enumerate(spec.tasks):
        try:
            configs.append(check(load(spec.overrides(task)), spec.num_ranks, spec.devices))
            faults += _faults_of_fewer(spec, load(spec.overrides(task)), check)
        except ConfigError as error:
            name = f"run {number}: " if len(spec.tasks) > 1 else ""
            faults += [f"{name}{fault}" for fault in error.faults]
    refuse(faults)
    target = folders.next_folder(base)
    script = backend.render(spec, site, target)
    argv = backend.argv(spec, target / folders.SCRIPT)
    if arguments.dry_run:
        return f"{script}\n# {shlex.join(argv)}"
    _require_no_live_job(base, spec)
    path = folders.keep(target, script, configs)
    snapshot.take(target / "source")
    try:
        ids = backend.submit(spec, path)
    except Exception:
        shutil.rmtree(target)  # nobody has this job
        raise
    folders.record(target, arguments.backend, spec, argv, ids)
    return f"submitted {' '.join(ids)}, {target}"


def _faults_of_fewer(spec: JobSpec, config: RunConfig, check: Check) -> list[str]:
    """What keeps a run from going on with the fewest nodes that its job allows."""
    try:
        if spec.min_nodes is not None:
            check(config, spec.min_nodes * spec.devices, spec.devices)
    except ConfigError as error:
        return [f"--min-nodes={spec.min_nodes}: {fault}" for fault in error.faults]
    return []


def _tasks(array: str | None, load: Load, base: Path) -> list[Task]:
    """The runs: one, or one for each line of a file of overrides, split as a shell does; `#` begins a remark."""
    if array is None:
        return [Task(run_dir=str(base))]
    try:
        sets = [shlex.split(line, comments=True) for line in Path(array).read_text().splitlines()]
    except ValueError as error:
        raise ConfigError([f"--array={array}: {error}"]) from error
    sets = [words for words in sets if words]
    tasks = []
    for number, words in enumerate(sets):
        own = any(word.startswith("run_dir=") for word in words)
        run_dir = str(load(words).directory.absolute()) if own else str(base / str(number))
        tasks.append(Task(overrides=tuple(words), run_dir=run_dir))
    used = [task.run_dir for task in tasks]
    refuse([f"--array={array}: {run_dir} is the directory of {used.count(run_dir)} runs; each needs its own"
            for run_dir in dict.fromkeys(used) if used.count(run_dir) > 1])  # fmt: skip
    if not tasks:
        raise ConfigError([f"--array={array} holds no overrides; write one run a line"])
    return tasks


def _spec(arguments: argparse.Namespace, site: Site, base: Path, tasks: list[Task]) -> JobSpec:
    local = arguments.backend == "local"
    restarts = 0 if local or not site.slurm.requeue else 2
    try:
        return JobSpec(
            name=arguments.name or base.name,
            config=arguments.config,
            tasks=tuple(
                task.model_copy(update={"overrides": (*arguments.overrides, *task.overrides)}) for task in tasks
            ),
            nodes=arguments.nodes,
            min_nodes=arguments.min_nodes,
            devices=arguments.devices or site.devices or 1,
            minutes=parse_minutes(arguments.time) if arguments.time else None,
            site=arguments.site,
            address=arguments.address,
            ranks=arguments.ranks or ("node" if local else "device"),
            workdir=str(Path.cwd()),
            python="python" if site.container else sys.executable,
            after=tuple(_job_of(name) for name in arguments.after),
            chain=arguments.chain,
            restarts=restarts if arguments.restarts is None else arguments.restarts,
            options=tuple(arguments.sbatch),
        )
    except ValidationError as error:
        found = [f"--{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise ConfigError(found) from error


def _job_of(name: str) -> str:
    """The id of a job that is named by itself or by its run."""
    if Path(name).is_dir():
        return folders.newest(Path(name))[1].ids[-1]
    if not name.isdecimal():
        raise ValueError(f"--after={name} is neither the number of a job nor a run directory")
    return name


def _require_no_live_job(run_dir: Path, spec: JobSpec) -> None:
    """Two jobs of one run would wait for its lock, or one would take it from under the other."""
    if not any(folders.folders(run_dir)):
        return
    try:
        _, last, states = _states(run_dir)
    except ValueError:
        return  # the last one was never submitted
    except (RuntimeError, OSError) as error:
        folder, last = folders.newest(run_dir)
        raise RuntimeError(
            f"whether job {' '.join(last.ids)} of {run_dir} is over cannot be asked ({error}); if it is, remove "
            f"{folder / folders.RECORD}"
        ) from error
    alive = [state for state in states if not state.is_over]
    if alive and not set(last.ids) <= set(spec.after):
        raise RuntimeError(
            f"job {alive[0].id} of {run_dir} is {alive[0].state}; `vidit cancel {shlex.quote(str(run_dir))}` ends it, "
            f"and --after={last.ids[-1]} lets the new one wait for it"
        )


def _states(run_dir: Path) -> tuple[Path, folders.Submitted, list[TaskState]]:
    folder, last = folders.newest(run_dir)
    return folder, last, load_backend(last.backend).status(last.ids, folder)


def status(run_dir: Path) -> str:
    """One line for each job or task, then what each run itself says."""
    folder, last, states = _states(run_dir)
    lines = [f"{last.backend} {state.id} {state.state}{state.detail and f' ({state.detail})'}" for state in states]
    lines += [line for task in last.spec.tasks if (line := _told(Path(task.run_dir)))]
    return "\n".join([*lines, f"script, code and output: {folder}"])


def _told(run_dir: Path) -> str:
    """What the run says of how it was left last."""
    try:
        facts = json.loads((run_dir / FILE).read_text())
    except (OSError, ValueError):
        return ""
    how = "done" if facts["done"] else f"stopped by {facts['signal'] or 'a signal to another rank'}"
    return f"{run_dir}: {how} at step {facts['step']}, start {facts['attempt'] or 'by hand'}"


def logs(run_dir: Path, lines: int, follow: bool) -> Iterator[str]:
    """The last lines of the output; with `follow` all that is added until the job is over."""
    folder, last = folders.newest(run_dir)
    backend = load_backend(last.backend)
    seen: dict[Path, int] = {}
    while True:
        is_over = not follow or all(state.is_over for state in backend.status(last.ids, folder))
        yield from _new_text(backend, last.ids, folder, lines, seen)
        if is_over:
            return
        time.sleep(POLL_S)


def _new_text(
    backend: Backend, ids: Sequence[str], folder: Path, lines: int, seen: dict[Path, int]
) -> Iterator[str]:  # fmt: skip
    paths = backend.logs(ids, folder)
    for path in paths:
        with path.open(errors="replace") as file:
            file.seek(seen.get(path, 0))
            text = "".join(file if path in seen else deque(file, lines))
            seen[path] = file.tell()
        if text and len(paths) > 1:
            yield f"==> {path.name}\n"
        yield text


def cancel(run_dir: Path) -> str:
    """Ask the jobs of the last submission to save and leave; those that were asked."""
    folder, last, states = _states(run_dir)
    left = [state.id for state in states if not state.is_over]
    if not left:
        return f"nothing to cancel: {', '.join(f'{state.id} is {state.state}' for state in states)}"
    load_backend(last.backend).cancel(last.ids, folder)
    return f"asked {' '.join(left)} to save and leave"
