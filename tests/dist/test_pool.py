"""The pool of ranks itself: what a task that ends its process does to the tasks after it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks.rank_pool import Pool, TaskError


def rank(ending: str) -> int:
    mine = dist.get_rank()
    if mine == 1 and ending == "exit":
        os._exit(3)
    if mine == 1 and ending == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return mine


@pytest.mark.parametrize(("ending", "code"), [("exit", 3), ("killed", -9)])
def test_a_worker_that_ends_is_named_and_replaced(tmp_path: Path, ending: str, code: int) -> None:
    pool = Pool(tmp_path)
    try:
        with pytest.raises(TaskError, match=f"rank 1: its process ended in the task, with exit code {code}"):
            pool.run(2, rank, ending)
        assert pool.run(2, rank, "") == [0, 1]
        pool.processes[1].kill()
        pool.processes[1].join()
        with pytest.raises(TaskError, match="rank 1: its process ended before the task, with exit code -9"):
            pool.run(2, rank, "")
        assert pool.run(2, rank, "") == [0, 1]
    finally:
        pool.close()
