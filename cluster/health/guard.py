"""Runs a check in a process of its own, under a time limit: a driver or a file system that hangs takes only that along.

The process leads a session, so that what it starts ends with it; it dies with whoever asked. One that cannot even be
killed, in a system call that does not return, is left behind: nobody waits for it.
"""

import ctypes
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from cluster.health.asked import Asked
from cluster.health.finding import Finding, UnfitError

Check = Callable[[Asked], Iterable[Finding]]
PDEATHSIG = 1  # PR_SET_PDEATHSIG of prctl
GONE_S = 2.0


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGKILL)


def run_check(check: Check, asked: Asked, limit_s: float) -> dict[str, Any]:
    """`verdict` (pass or fail), `seconds`, `findings`, and where it failed `because`, one line."""
    context = multiprocessing.get_context("fork")  # nothing here has threads or CUDA yet
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(check, asked, theirs))
    start = time.monotonic()
    process.start()
    theirs.close()
    told = _answer(ours, limit_s)
    if process.pid and process.exitcode is None:
        if told is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.join(GONE_S)
    if told is None:
        code = process.exitcode
        took = time.monotonic() - start
        if took >= limit_s:
            because = f"no answer in {took:.3g} s, at most {limit_s:g}; look at dmesg for a device or disk that hangs"
        else:
            because = f"the check ended with code {code} and no answer; look at dmesg for a crash"
        told = {"findings": [], "because": because}
    verdict = "fail" if told.get("because") else "pass"
    return {"verdict": verdict, "seconds": round(time.monotonic() - start, 3), **told}


def _answer(connection: Connection, limit_s: float) -> dict[str, Any] | None:
    try:
        if not connection.poll(limit_s):
            return None
        told: dict[str, Any] = json.loads(connection.recv_bytes())
        return told
    except EOFError:
        return None


def _child(check: Check, asked: Asked, connection: Connection) -> None:
    os.setsid()
    die_with_parent()
    found: list[Finding] = []
    because = ""
    try:
        for finding in check(asked):
            found.append(finding)
        because = "; ".join(str(finding) for finding in found if not finding.is_fit)
    except UnfitError as error:
        because = str(error)
    except Exception as error:
        because = f"{type(error).__name__}: {error}; the check itself cannot run here"
    told = {
        "findings": [finding.told() for finding in found],
        **({"because": " ".join(because.split())} if because else {}),
    }
    connection.send_bytes(json.dumps(told).encode())
    connection.close()
    os._exit(0)  # no clean-up of a library may hang after the answer
