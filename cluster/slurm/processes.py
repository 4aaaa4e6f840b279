"""Processes of a throwaway SLURM: found by a mark in their environment, since jobs outlive the daemons by design."""

import os
from pathlib import Path

from cluster.processes import environment_of, is_alive

ROOT, NODE = "SLURM_LOCAL_ROOT", "SLURM_LOCAL_NODE"


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
