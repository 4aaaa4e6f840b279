"""A pool of worker processes for ranks on this machine: started once, a fresh process group for every task.

Starting a process costs seconds, a gloo group over a file store milliseconds. A task is a function of a module
that the workers can import and one picklable argument; it runs on ranks 0 .. world - 1 at once.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import multiprocessing
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

TIMEOUT_S = 60
START_S = 300
ENDING_S = 10
MOST_THREADS = (
    48  # of a worker: more are those of groups that a task has left behind, each awake a hundred times a second
)
CACHES: list[functools._lru_cache_wrapper[Any]] = []  # of torch.distributed


class TaskError(RuntimeError):
    """What the ranks raised, as text: {rank: traceback}."""

    def __init__(self, failures: dict[int, str]):
        super().__init__("\n".join(f"rank {rank}: {text}" for rank, text in failures.items()))
        self.failures = failures


class WorkerEndedError(TaskError):
    """A worker that is gone, and the exit code of its process: a signal's number, negative, where one ended it."""

    def __init__(self, rank: int, when: str, code: int | None):
        super().__init__({rank: f"its process ended {when}, with exit code {code}"})
        self.code = code


def serve(pipe: Connection, rank: int, timeout_s: float) -> None:
    """The loop of one worker."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    faulthandler.enable()
    pipe.send("ready")
    while True:
        task = pipe.recv()
        faulthandler.dump_traceback_later(1.5 * timeout_s)  # where a rank waits, should it wait for ever
        if task is None:
            return
        function, argument, store, world = task
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s)
            )
            try:
                dist.barrier()  # or a task that sends nothing may be over here before another rank has connected
                result = True, function(argument)
            finally:
                dist.destroy_process_group()
        except Exception:
            result = False, traceback.format_exc()
        forget_meshes()  # here, where what was raised no longer holds them
        faulthandler.cancel_dump_traceback_later()
        pipe.send((*result, psutil.Process().num_threads()))


def forget_meshes() -> None:
    """Drops the meshes of the task that ended, and with them its groups.

    DTensor keeps in caches what it has seen of each mesh. An equal mesh of the next task has other groups; and every
    gloo group that is left wakes a thread of its own a hundred times a second, which after a hundred tasks is all that
    two cores do. What outlives a task, modules above all, is not looked at again: with torch loaded a look at all of
    it takes a third of a second.
    """
    from torch.distributed.tensor import _redistribute, debug

    getattr(debug, "_clear_sharding_prop_cache", list)()
    getattr(_redistribute, "clear_redistribute_planner_cache", list)()
    for cached in gc.get_objects():
        if type(cached) is functools._lru_cache_wrapper and str(cached.__module__).startswith("torch.distributed"):
            CACHES.append(cached)
    for cached in CACHES:
        cached.cache_clear()
    gc.collect()
    gc.freeze()


class Pool:
    """`pool.run(world, function, argument)` -> the result of each rank; TaskError if any of them raised.

    A task in which a worker ends by SIGSEGV is run once more, with a warning and new workers: once in some thousand
    tasks a thread crashes that is none of Python's (with torch 2.13; where the kernel named it, it was gloo's). What
    crashes in the task itself does so again.
    """

    def __init__(self, folder: Path, timeout_s: float = TIMEOUT_S):
        self.folder, self.tasks, self.timeout_s = folder, 0, timeout_s
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []

    def run(self, world: int, function: Callable[[Any], Any], argument: Any) -> list[Any]:
        try:
            return self._run(world, function, argument)
        except WorkerEndedError as ended:
            if ended.code != -signal.SIGSEGV:
                raise
            warnings.warn(f"{ended}; the task is run once more", stacklevel=2)
        return self._run(world, function, argument)

    def _run(self, world: int, function: Callable[[Any], Any], argument: Any) -> list[Any]:
        self._grow(world)
        self.tasks += 1
        store = self.folder / f"store-{self.tasks}"
        failures, results, most = {}, [], 0
        for rank in range(world):
            with self._alive(rank, "before the task"):
                self.pipes[rank].send((function, argument, store, world))
        for rank, pipe in enumerate(self.pipes[:world]):
            if not pipe.poll(2 * self.timeout_s):
                self.close()
                raise TaskError({rank: f"no answer after {2 * self.timeout_s:g} s; the pool was stopped"})
            with self._alive(rank, "in the task"):
                good, result, threads = pipe.recv()
            results.append(result)
            most = max(most, threads)
            if not good:
                failures[rank] = result
        torn = any("gloo" in text.lower() for text in failures.values())
        if torn or most > MOST_THREADS:
            self.close()  # the next task has new workers: who left a collective in its middle may still be written to
        if failures:
            raise TaskError(failures)
        return results

    @contextlib.contextmanager
    def _alive(self, rank: int, when: str) -> Iterator[None]:
        """A worker that is gone is a WorkerEndedError; the next task has new workers."""
        try:
            yield
        except (EOFError, OSError) as error:
            process = self.processes[rank]
            process.join(ENDING_S)
            code = process.exitcode
            self.close()
            raise WorkerEndedError(rank, when, code) from error

    def _grow(self, world: int) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self.processes) < world:
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there, len(self.processes), self.timeout_s), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)
            assert here.poll(START_S), f"a worker did not start in {START_S} s"
            here.recv()

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join()
        self.pipes, self.processes = [], []
