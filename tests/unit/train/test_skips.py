"""How many clips may fail: `data.max_skipped`, taken at its word."""

from __future__ import annotations

from typing import Any

import pytest

from vidit.train.skips import SkipCount, SkipLimitError


class Listener:
    """A reporter that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def count(limit: float) -> tuple[SkipCount, Any]:
    listener = Listener()
    return SkipCount(limit, listener), listener


def test_a_fraction_forgives_the_first() -> None:
    skips, listener = count(0.01)
    skips.add(1, [("b", "torn")])
    assert listener.said == ["skipped clip b: torn"]
    skips.add(198, [("c", "torn")])  # 2 of 201
    with pytest.raises(SkipLimitError, match=r"3 of 202 clips .* data\.max_skipped=0\.01 .* d: torn"):
        skips.add(0, [("d", "torn")])


def test_a_start_goes_on_from_what_was_counted_before() -> None:
    skips, _ = count(0.01)
    skips.add(98, [("b", "torn"), ("c", "torn")][:1])
    again = SkipCount(0.01, Listener(), (skips.seen, skips.skipped))  # type: ignore[arg-type]
    with pytest.raises(SkipLimitError, match="2 of 100 clips"):
        again.add(0, [("d", "torn")])


def test_zero_means_none() -> None:
    skips, _ = count(0)
    skips.add(1000, [])
    with pytest.raises(SkipLimitError, match=r"1 of 1001 clips could not be used, more than data\.max_skipped=0 "):
        skips.add(0, [("b", "torn")])


def test_one_means_all() -> None:
    skips, _ = count(1.0)
    for _ in range(5):
        skips.add(0, [("b", "torn")])
