"""Worker processes: ``map`` over them, and how each starts and ends.

A signal that reaches every process of a job, as schedulers and terminals send it, is for the parent to answer: a
worker that died of it would take along a run that is about to save, or a lock that the parent waits for.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import TypeVar

HELD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def mapped(function: Callable[[_Item], _Result], items: Iterable[_Item], workers: int) -> Iterator[_Result]:
    """``function`` of each item, by ``workers`` processes (0 or 1: this one); what it raises is raised here."""
    if workers <= 1:
        yield from map(function, items)
        return
    with signals_held():
        pool = _Context().Pool(workers, initializer=start_worker)
    with pool:
        yield from pool.imap(function, items, chunksize=4)


class _Process(SpawnProcess):
    """A worker that a pool ends by a signal which cannot merge with one that the worker holds back already."""

    def terminate(self) -> None:
        self.kill()


class _Context(SpawnContext):
    """Spawn, not fork: the parent may have started OpenMP threads, whose locks a forked child never gets."""

    Process = _Process


@contextmanager
def signals_held() -> Iterator[None]:
    """What is started inside never dies of a signal in ``HELD``; for the caller itself they wait until the end."""
    # Child processes and threads inherit the mask, a server that forks workers too. The tracker of shared memory
    # comes first: Python 3.11 clears the mask when it starts one.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(_: int = 0) -> None:
    """What a worker that was started with ``signals_held`` does first: one thread for torch, an end with its parent."""
    import torch

    torch.set_num_threads(1)
    for follow in (_leave_with_parent, _leave_when_told):
        threading.Thread(target=follow, daemon=True).start()


def _leave_with_parent() -> None:
    """End this worker when its parent is killed. A fork server lives as long as its workers, and they as it does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _leave_when_told() -> None:
    """End this worker on a signal from its parent itself, which is how Python ends what is left at its exit."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while signal.sigwaitinfo(HELD).si_pid != parent.pid:
        pass
    os._exit(1)
