"""The batch script of a job: cluster/slurm/job.sh.j2 filled in. Pure text.

Whatever a person typed reaches bash in quotes of `shlex.quote`, and sbatch in its own, so spaces, quotes, `;` and
`$(...)` stay what they are. Paths that some part of the way cannot quote are refused in `faults`.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from launch.job import JobSpec, format_minutes
from launch.site import Container, Site

TEMPLATES = Path(__file__).parents[1] / "cluster" / "slurm"
MAX_CHECKS = 5
"""How often nodes are left out after a check: it leaves out all that are bad, so more often it is the check itself."""
PLAIN = re.compile(r"[\w@%+=:,./\[\]-]+")


def quoted(value: str) -> str:
    """A word of an #SBATCH line: sbatch reads double quotes and backslashes there, and nothing else."""
    return value if PLAIN.fullmatch(value) else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def options(spec: JobSpec, site: Site, folder: Path) -> Iterator[str]:
    """What is asked of SLURM, one option a line of the script."""
    s, minutes = site.slurm, spec.minutes or site.minutes
    several = len(spec.tasks) > 1
    by_device = spec.ranks == "device"
    kind = f":{s.device_type}" if s.device_type else ""
    wanted = {
        "job-name": spec.name,
        "output": f"{str(folder).replace('%', '%%')}/output-%{'A_%a' if several else 'j'}.log",
        "open-mode": "append",
        "array": f"0-{len(spec.tasks) - 1}" if several else None,
        "nodes": spec.nodes,
        "ntasks-per-node": spec.devices if by_device else 1,
        "cpus-per-task": s.cpus_per_device and s.cpus_per_device * (1 if by_device else spec.devices),
        "gres": f"gpu{kind}:{spec.devices}" if s.devices_as == "gres" else None,
        "gpus-per-node": f"{kind[1:]}{kind and ':'}{spec.devices}" if s.devices_as == "gpus-per-node" else None,
        "mem": s.memory,
        "time": format_minutes(minutes) if minutes else None,
        "signal": f"B:{s.signal}@{s.signal_before_s}",
        "partition": s.partition,
        "account": s.account,
        "qos": s.qos,
        "constraint": s.constraint,
        "reservation": s.reservation,
        "export": ",".join(site.keep) or "NIL",
    }
    yield from (f"--{name}={quoted(str(value))}" for name, value in wanted.items() if value is not None)
    if s.exclusive:
        yield "--exclusive"
    yield "--requeue" if s.requeue else "--no-requeue"
    yield from (quoted(option) for option in (*s.options, *spec.options))


def flags(spec: JobSpec, site: Site) -> list[str]:
    """Of the srun that starts the ranks; sizes are repeated, since srun does not take all from the job."""
    s, by_device = site.slurm, spec.ranks == "device"
    per_node = spec.devices if by_device else 1
    found = ["--kill-on-bad-exit=1", f"--nodes={spec.nodes}", f"--ntasks={spec.nodes * per_node}",
             f"--ntasks-per-node={per_node}"]  # fmt: skip
    if s.cpus_per_device:
        found.append(f"--cpus-per-task={s.cpus_per_device * (1 if by_device else spec.devices)}")
    if s.bind:
        found.append(shlex.quote(f"--cpu-bind={s.bind}"))
    return found


def pyxis(container: Container) -> list[str]:
    """Flags of srun by which its plug-in runs the processes in a container."""
    mounts = "".join("," + mount for mount in container.mounts)
    return [shlex.quote(f"--container-image={container.image}"),
            f'--container-mounts="$job:$job,$run:$run,$PWD:$PWD"{shlex.quote(mounts) if mounts else ""}',
            '--container-workdir="$PWD"', "--no-container-mount-home"]  # fmt: skip


def apptainer(container: Container) -> list[str]:
    """The command that goes before ours."""
    binds = [f"--bind={shlex.quote(mount)}" for mount in container.mounts]
    return ["apptainer", "exec", "--nv", '--bind="$job"', '--bind="$run"', '--bind="$PWD"', *binds,
            '--pwd="$PWD"', shlex.quote(container.image)]  # fmt: skip


def words(parts: Sequence[str]) -> str:
    return " ".join(parts)


def check_command(spec: JobSpec, site: Site) -> list[str]:
    """The site's check of a node, with what it needs to know of the job."""
    known = {"{python}": spec.python, "{devices}": str(spec.devices), "{hardware}": site.hardware or ""}
    return [known.get(word, word) for word in site.health.command] if site.health else []


def render(spec: JobSpec, site: Site, folder: Path) -> str:
    """The script; it lies in `folder`, the folder of this submission."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["sh"] = shlex.quote
    c, more = site.container, []
    if c and c.runtime == "pyxis":
        more = pyxis(c)
    prefix = words([*apptainer(c), ""]) if c and c.runtime == "apptainer" else ""
    nodes = [f"--nodes={spec.nodes}", f"--ntasks={spec.nodes}", "--ntasks-per-node=1"]
    if site.slurm.cpus_per_device:  # or the check has one core for all devices of its node
        nodes.append(f"--cpus-per-task={site.slurm.cpus_per_device * spec.devices}")
    return environment.get_template("job.sh.j2").render(
        title=f"{spec.name}: {spec.num_ranks} ranks, {spec.nodes} nodes of {spec.devices} devices",
        options=list(options(spec, site, folder)),
        folder=str(folder),
        submission=folder.name,
        workdir=spec.workdir,
        tasks=[{"run_dir": t.run_dir, "command": shlex.join(spec.command(t))} for t in spec.tasks],
        environment=dict(site.environment),
        modules=site.modules,
        setup=site.setup,
        signal=site.slurm.signal,
        requeue=site.slurm.requeue,
        restarts=spec.restarts,
        checks=MAX_CHECKS,
        flags=words([*flags(spec, site), *more]),
        prefix=prefix,
        health=prefix + shlex.join(check_command(spec, site)) if site.health else "",
        health_flags=words([*nodes, *more]),
        health_call=f'timeout {site.health.timeout_s} "$@"' if site.health else "",
    )


def faults(spec: JobSpec, site: Site) -> Iterator[str]:
    """What keeps a job from running on a site, one line each."""
    s, minutes = site.slurm, spec.minutes or site.minutes
    for name, value in (("min-nodes", spec.min_nodes), ("address", spec.address)):
        if value:
            yield f"--{name} has no effect with back-end slurm; leave it out"
    if site.devices and spec.devices > site.devices:
        yield f"--devices={spec.devices}: a node of site {spec.site} has {site.devices}; use at most that many"
    if minutes is not None and minutes * 60 <= s.signal_before_s:
        yield (
            f"--time={minutes} minutes is not more than the {s.signal_before_s} s before its end at which the run is "
            "asked to save (slurm.signal_before_s of the site); give more time, or a shorter notice"
        )
    if spec.chain > 1 and len(spec.tasks) > 1:
        yield f"--chain={spec.chain} goes with one run, and --array has {len(spec.tasks)}; submit a chain for each"
    if not s.requeue and spec.restarts and spec.chain == 1:
        yield (
            f"--restarts={spec.restarts} has no effect: site {spec.site} requeues nothing; give --restarts 0, or "
            "--chain for jobs that go on where one ended"
        )
    for option in (*s.options, *spec.options):
        if "\n" in option or "\r" in option:
            yield f"{option!r} holds a line break, which ends an #SBATCH line; give one option each"
    used = "".join(task.run_dir for task in spec.tasks) + spec.workdir
    for bad in ("\n", "\r", "\\", ":", *([","] if site.container else [])):
        if bad in used:
            yield (
                f"{bad!r} is in the path of the run or of the working directory, and SLURM, PYTHONPATH or a container "
                "does not take that; use another directory"
            )
