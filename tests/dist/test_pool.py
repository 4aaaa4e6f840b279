"""The pool of ranks itself: what a task that ends its process does to the tasks after it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks.rank_pool import Pool, TaskError, WorkerEndedError


def rank(ends: bool) -> int:
    mine = dist.get_rank()
    if mine == 1 and ends:
        os._exit(3)
    return mine


def rank_after_a_crash(crashed: Path) -> int:
    """Rank 1 crashes the first time, and leaves the file."""
    if dist.get_rank() == 1 and not crashed.exists():
        crashed.touch()
        ctypes.string_at(0)
    return dist.get_rank()


def test_a_worker_that_ends_is_named_and_replaced(tmp_path: Path) -> None:
    pool = Pool(tmp_path)
    try:
        with pytest.raises(TaskError, match="rank 1: its process ended in the task, with exit code 3"):
            pool.run(2, rank, True)
        assert pool.run(2, rank, False) == [0, 1]
        pool.processes[1].kill()
        pool.processes[1].join()
        with pytest.raises(TaskError, match="rank 1: its process ended before the task, with exit code -9"):
            pool.run(2, rank, False)
    finally:
        pool.close()


def test_a_crash_that_does_not_come_again_is_a_warning(tmp_path: Path) -> None:
    pool = Pool(tmp_path)
    try:
        with pytest.warns(UserWarning, match="exit code -11; the task is run once more"):
            assert pool.run(2, rank_after_a_crash, tmp_path / "crashed") == [0, 1]
    finally:
        pool.close()


def test_a_crash_that_comes_again_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, tries = Pool(tmp_path), []

    def crash(*task: object) -> list[int]:
        tries.append(task)
        raise WorkerEndedError(1, "in the task", -11)

    monkeypatch.setattr(pool, "_run", crash)
    with pytest.warns(UserWarning, match="once more"), pytest.raises(TaskError, match="task, with exit code -11"):
        pool.run(2, rank, False)
    assert len(tries) == 2
