"""Why do the losses of some pipelines differ from one process by more than 1e-6 in fp32?

    python -m benchmarks.parity_rounding

Repeats rows of `benchmarks.parity` with other terms under the root that AdamW divides by (`train.eps`), and with plain
gradient descent, which divides by nothing. In all of them the ranks' gradients round alike.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import parity
from benchmarks.parity import Result, compare
from benchmarks.parity_rows import LAYOUTS, Case, Row
from benchmarks.rank_pool import Pool
from benchmarks.record import write_result

ROWS = ("pp4 gpipe", "pp2 zero_bubble V", "sp2 x pp2", "zero3 x pp2")
EPS = (1e-8, 1e-5, 1e-3)
RATE = 0.05


def descended(case: Case) -> Result:
    """Five steps of plain gradient descent."""
    with plain_descent():
        return parity.train(case)


@contextmanager
def plain_descent() -> Iterator[None]:
    def build(_: Any, named: dict[str, Any]) -> torch.optim.Optimizer:
        return torch.optim.SGD(named.values(), lr=RATE, foreach=False)

    with patch.object(parity, "build_optimizer", build):
        yield


def with_eps(row: Row, eps: float) -> Row:
    return replace(row, train={**row.train, "eps": eps})


def measure(pool: Pool, name: str) -> dict[str, float]:
    """Largest relative difference of a loss from one process's, by optimizer."""
    row, found = LAYOUTS[name], {}
    for eps in EPS:
        one = pool.run(1, parity.train, Case("walt", "fp32", with_eps(row.alone, eps)))[0]
        ranks = pool.run(row.ranks, parity.train, Case("walt", "fp32", with_eps(row, eps)))
        found[f"AdamW, eps {eps:g}"] = compare(one, ranks)["loss"]
    one = pool.run(1, descended, Case("walt", "fp32", row.alone))[0]
    found["gradient descent"] = compare(one, pool.run(row.ranks, descended, Case("walt", "fp32", row)))["loss"]
    return found


def main() -> None:
    with TemporaryDirectory() as folder:
        pool = Pool(Path(folder), timeout_s=600)
        try:
            found = {name: measure(pool, name) for name in ROWS}
        finally:
            pool.close()
    print(json.dumps(found, indent=1))
    print(write_result("parity-rounding", found))


if __name__ == "__main__":
    main()
