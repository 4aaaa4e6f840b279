"""One pool of workers for all distributed tests, and the modules that it runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Workers import what they run by name; a spawned process gets this path too.
sys.path.insert(0, str(Path(__file__).parent))


from benchmarks.rank_pool import Pool


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    pool = Pool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()
