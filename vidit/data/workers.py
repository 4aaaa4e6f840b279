"""Worker processes: ``map`` over them, and how each starts and ends.

A signal that reaches every process of a job, as schedulers and terminals send it, is for the parent to answer: a
worker that died of it would take along a run that is about to save, or a lock that the parent waits for.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, TypeVar

HELD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_Submit = Callable[..., "Future[Any]"]


def mapped(
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    workers: int,
    lost: Callable[[_Item], _Result] | None = None,
) -> Iterator[_Result]:
    """``function`` of each item, in order, by ``workers`` processes (0 or 1: this one); what it raises is raised here.

    A worker that dies (its decoder crashes, the system ends it for its memory) costs a new set of them, and each item
    that was being worked on then gets a worker of its own. One that ends that one too is given to ``lost``; without it
    RuntimeError.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    rest = iter(items)
    while True:
        with _pool(workers) as submit:
            unanswered = yield from _answered(function, rest, submit, 4 * workers)
        if not unanswered:
            return
        for item in unanswered:
            with _pool(1) as submit:
                broken = yield from _answered(function, iter([item]), submit, 1)
            if broken:
                if not lost:
                    raise RuntimeError(
                        f"a worker process ended without a word, twice, on {item}: it crashed, or had too little memory"
                    )
                yield lost(item)


def _answered(
    function: Callable[[_Item], _Result], items: Iterator[_Item], submit: _Submit, ahead: int
) -> Generator[_Result, None, list[_Item]]:
    """Results in order, ``ahead`` items being worked on; returns those without one when a worker has died."""
    working: deque[tuple[_Item, Future[_Result]]] = deque()
    while True:
        try:
            for item in islice(items, ahead - len(working)):
                working.append((item, Future()))
                working[-1] = item, submit(function, item)
            if not working:
                return []
            yield working[0][1].result()
        except BrokenProcessPool:
            return [item for item, _ in working]
        working.popleft()


@contextmanager
def _pool(workers: int) -> Iterator[_Submit]:
    """How to hand work to that many processes, which end with the block, whatever they are at."""
    context = _Context()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)

    def submit(function: Callable[..., Any], item: Any) -> Future[Any]:
        with signals_held():  # a worker is started with the item that it is needed for
            return pool.submit(function, item)

    try:
        yield submit
    finally:
        for process in context.started:
            process.kill()
        pool.shutdown(cancel_futures=True)


class _Context(SpawnContext):
    """Spawn, not fork: the parent may have started OpenMP threads, whose locks a forked child never gets."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[SpawnProcess] = []

    def Process(self, *arguments: Any, **named: Any) -> SpawnProcess:  # type: ignore[override]  # noqa: N802
        process = _Process(*arguments, **named)
        self.started.append(process)
        return process


class _Process(SpawnProcess):
    """A worker that a pool ends by a signal which cannot merge with one that the worker holds back already."""

    def terminate(self) -> None:
        self.kill()


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
