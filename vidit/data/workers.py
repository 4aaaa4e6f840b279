"""``map`` over worker processes: the results in order, whatever the number of workers."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def mapped(function: Callable[[_Item], _Result], items: Iterable[_Item], workers: int) -> Iterator[_Result]:
    """``function`` of each item, by ``workers`` processes (0 or 1: this one); what it raises is raised here."""
    if workers <= 1:
        yield from map(function, items)
        return
    # Not fork: the parent may have started OpenMP threads, whose locks a forked child never gets.
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, initializer=_start_worker) as pool:
        yield from pool.imap(function, items, chunksize=4)


def _start_worker() -> None:
    import torch

    torch.set_num_threads(1)
