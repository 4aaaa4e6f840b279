"""Work handed to processes: results in order, errors as they are, and what a worker that dies costs."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from vidit.data.workers import mapped


def square(number: int, deadly: int = -1, folder: Path | None = None) -> int:
    """Ends its process at one number: each time, or, with a folder, the first time."""
    if number == 3 and deadly != 3:
        raise ValueError("three is refused")
    if number == deadly and not (folder and (folder / "died").exists()):
        if folder:
            (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    return number * number


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    """Whatever happens in a test, no process of it is left."""
    before = set(multiprocessing.active_children())
    yield
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize("workers", [0, 2])
def test_in_order_and_an_error_is_raised_in_its_place(workers: int) -> None:
    results = mapped(square, range(9), workers)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    with pytest.raises(ValueError, match="three is refused"):
        next(results)


def test_an_end_in_the_middle_leaves_no_process() -> None:
    results = mapped(square, iter(range(10**9)), 2)
    assert next(results) == 0
    results.close()


def test_a_worker_that_dies_once_costs_nothing(tmp_path: Path) -> None:
    function = functools.partial(square, deadly=3, folder=tmp_path)
    assert list(mapped(function, range(12), 2)) == [n * n for n in range(12)]


def test_an_item_that_kills_its_worker_each_time() -> None:
    function = functools.partial(square, deadly=3)
    assert list(mapped(function, range(6), 2, lost=lambda item: -item)) == [0, 1, 4, -3, 16, 25]
    with pytest.raises(RuntimeError, match=r"ended without a word, twice, on 3: it crashed, or had too little memory"):
        list(mapped(function, range(6), 2))
