"""Every start leaves a row, and no row is ever lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from vidit.train.costs import Start, costed, read_costs


def test_a_start_that_fails_is_counted(tmp_path: Path) -> None:
    with costed(tmp_path, "train") as start:
        start.step = 7
    with pytest.raises(ZeroDivisionError), costed(tmp_path, "train") as start:
        _fail_at(start, 9)
    rows = read_costs(tmp_path)
    assert [(row["stage"], row["step"]) for row in rows] == [("train", 7), ("train", 9)]
    assert all(row["seconds"] >= 0 and row["peak_rss_gib"] > 0 for row in rows)


def _fail_at(start: Start, step: int) -> None:
    start.step = step
    raise ZeroDivisionError


def test_a_torn_row_costs_no_other(tmp_path: Path) -> None:
    with costed(tmp_path, "train"):
        pass
    with (tmp_path / "costs.jsonl").open("a") as file:
        file.write('{"stage": "tra')
    with costed(tmp_path, "evaluate"):
        pass
    assert [row["stage"] for row in read_costs(tmp_path)] == ["train", "evaluate"]
    assert read_costs(tmp_path / "none") == []
