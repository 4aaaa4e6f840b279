"""Processes of a throwaway SLURM: found by a mark in their environment, since jobs outlive the daemons by design."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT, NODE = "SLURM_LOCAL_ROOT", "SLURM_LOCAL_NODE"
GONE_S = 5.0


def environment_of(process: int) -> dict[str, str]:
    """What a process was started with; empty where it is gone, a zombie or not ours to look at."""
    try:
        raw = Path(f"/proc/{process}/environ").read_bytes()
    except OSError:
        return {}
    return dict(item.split("=", 1) for item in raw.decode(errors="replace").split("\0") if "=" in item)


def is_alive(process: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def find(root: Path, node: str | None = None) -> list[int]:
    """Daemons, step managers and processes of jobs of the SLURM in `root`; of one node only where it is named.

    Daemons carry the mark ROOT. What a job started carries SLURM's own variables instead; a shell in which somebody
    uses this SLURM has no job.
    """
    conf, found = str(root / "slurm.conf"), []
    for path in Path("/proc").glob("[0-9]*"):
        process = int(path.name)
        told = environment_of(process) if process != os.getpid() else {}
        ours = told.get(ROOT) == str(root)
        job = told.get("SLURM_CONF") == conf and "SLURM_JOB_ID" in told and "SLURMD_NODENAME" in told
        at = told.get(NODE) or told.get("SLURMD_NODENAME")
        if (ours or job) and (node is None or at == node) and is_alive(process):
            found.append(process)
    return found


def end(search: Callable[[], list[int]]) -> None:
    """SIGKILL all that `search` finds, until it finds none. RuntimeError where some cannot be ended."""
    deadline = time.monotonic() + GONE_S
    while found := search():
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {found} do not end after SIGKILL in {GONE_S:g} s; look at them with ps")
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)
