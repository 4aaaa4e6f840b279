"""The pool of ranks itself: what a task that ends its process does to the tasks after it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks.rank_pool import Pool, TaskError


def rank(ends: bool) -> int:
    mine = dist.get_rank()
    if mine == 1 and ends:
        os._exit(3)
    return mine


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
