"""One process at a time trains a run: RUN/lock, held with flock, which the kernel releases however a process ends."""

import errno
import fcntl
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Make the run directory and hold its lock. RuntimeError, naming the holder, where another process has it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RuntimeError(
                f"{run_dir} is being trained by {holder}; wait for it or stop it (kill -TERM saves first), or give "
                "another run_dir"
            ) from error
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            log.warning("%s takes no lock (%s): do not start the run twice at once", run_dir, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
