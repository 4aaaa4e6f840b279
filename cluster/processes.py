"""Processes of this machine, as the throwaway clusters look for theirs and end them."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

GONE_S = 5.0


def environment_of(process: int) -> dict[str, str]:
    """What a process was started with; empty where it is gone, a zombie or not ours to look at."""
    try:
        raw = Path(f"/proc/{process}/environ").read_bytes()
    except OSError:
        return {}
    return dict(item.split("=", 1) for item in raw.decode(errors="replace").split("\0") if "=" in item)


def command_of(process: int) -> str:
    """The program that it runs; empty where it is gone."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    except OSError:
        return ""


def is_alive(process: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


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
