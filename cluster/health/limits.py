"""What the system allows a process: open files, locked memory, the size of /dev/shm."""

import os
import resource
from collections.abc import Iterator

from cluster.health.asked import Asked
from cluster.health.finding import Finding, at_least

OPEN_FILES = 4096  # workers of loaders hold shards, pipes and sockets open
LOCKED_BYTES = 1 << 30  # InfiniBand pins the buffers of NCCL
PROCESSES = 4096


def limits(asked: Asked) -> Iterator[Finding]:
    """Soft limits, since those are what a process gets."""
    yield _of(resource.RLIMIT_NOFILE, "open files", OPEN_FILES, "raise `ulimit -n` for jobs")
    yield _of(resource.RLIMIT_NPROC, "processes and threads", PROCESSES, "raise `ulimit -u` for jobs")
    if asked.gpus and asked.place.nodes > 1:
        cure = "set `ulimit -l unlimited` for jobs (LimitMEMLOCK of slurmd)"
        yield _of(resource.RLIMIT_MEMLOCK, "bytes of locked memory", LOCKED_BYTES, cure)
    shared = os.statvfs("/dev/shm")
    size = shared.f_frsize * shared.f_blocks / 2**30
    cure = "give the container a larger one (docker --shm-size, --ipc=host)"
    yield at_least("/dev/shm in GiB", size, asked.shm_gib, cure)


def _of(kind: int, what: str, least: int, cure: str) -> Finding:
    soft = resource.getrlimit(kind)[0]
    if soft == resource.RLIM_INFINITY:
        return Finding(what, "unlimited", f"at least {least}", cure)
    return at_least(what, soft, least, cure)
