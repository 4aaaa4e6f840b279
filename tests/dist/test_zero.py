"""ZeRO levels and replicas: gradients, their norm and three AdamW steps equal one process, micro-batches included."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from rank_pool import Pool, TaskError
from zero_case import PLANTS, Outcome, Train, errors, on_ranks, single

from parallel.layout import Layout

LAYOUTS: dict[str, dict[str, int]] = {
    "dp2": {"shard": 2},
    "2x2": {"replicate": 2, "sequence": 2},
    "tp2": {"shard": 2, "tensor": 2},
    "sp2": {"sequence": 2},
}


@functools.cache
def reference(accumulation: int, steps: int) -> Outcome:
    return single(Train({}, 3, accumulation, steps))


def run(pool: Pool, case: Train) -> list[Outcome]:
    return pool.run(Layout(**case.layout).world, on_ranks, case)


def measured(pool: Pool, case: Train) -> dict[str, float]:
    return errors(run(pool, case)[0], reference(case.accumulation, case.steps))


def assert_equal(found: dict[str, float]) -> None:
    assert found["gradient"] <= 1e-11, found
    assert found["norm"] <= 1e-12, found
    assert found["parameter"] <= 1e-10, found
    assert found["validation"] <= 1e-11, found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_levels(pool: Pool, layout: str, level: int) -> None:
    assert_equal(measured(pool, Train(LAYOUTS[layout], level, checkpoint=layout == "sp2")))
