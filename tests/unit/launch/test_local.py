"""What a local launch tells its ranks, and what they report. No process is started here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.local import variables_of
from launch.rank import Place
from parallel.failure import RankError, read_report, report_of, write_report


def test_each_rank_gets_its_share_of_the_cores() -> None:
    assert variables_of(4, {"HOME": "/root"}, 10) == {"OMP_NUM_THREADS": "2", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    assert variables_of(8, {}, 2)["OMP_NUM_THREADS"] == "1"


def test_the_user_decides_on_threads_and_warnings() -> None:
    assert variables_of(4, {"OMP_NUM_THREADS": "7", "TORCH_CPP_LOG_LEVEL": "INFO"}, 10) == {}


class TestPlace:
    def test_alone(self) -> None:
        assert Place.of({"LOCAL_RANK": "3"}) is None

    def test_of_torchrun(self) -> None:
        assert Place.of({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}) == Place(5, 8, 4)

    @pytest.mark.parametrize("local", [1, 4])
    def test_it_fits(self, local: int) -> None:
        Place(5, 8, 4).check(local)

    def test_it_does_not_fit(self) -> None:
        with pytest.raises(ValueError, match=r"launch\.local=2 starts ranks, but .* rank 5 of 8, 4 of them"):
            Place(5, 8, 4).check(2)


class TestReport:
    def test_round_trip(self, tmp_path: Path) -> None:
        try:
            raise ValueError("no such clip")
        except ValueError as error:
            report = report_of(error, 3)
        write_report(tmp_path / "error.json", report)
        assert read_report(tmp_path / "error.json") == report
        assert (report.rank, report.message) == (3, "no such clip")
        assert "test_round_trip" in report.trace
        # torchrun reads the same file for its own summary.
        assert int(json.loads((tmp_path / "error.json").read_text())["message"]["extraInfo"]["timestamp"]) > 0

    def test_the_first_counts(self, tmp_path: Path) -> None:
        for text in ("first", "second"):
            write_report(tmp_path / "error.json", report_of(ValueError(text), 0))
        report = read_report(tmp_path / "error.json")
        assert report is not None
        assert report.message == "first"

    @pytest.mark.parametrize(
        ("error", "rank", "message"),
        [
            (RankError(2, "is gone"), 2, "is gone"),
            (RankError(None, "a cable"), None, "a cable"),
            (TypeError("x"), 0, "TypeError: x"),
            (RuntimeError(), 0, "RuntimeError"),
            (KeyboardInterrupt(), 0, "interrupted"),
        ],
    )
    def test_who_and_what(self, error: BaseException, rank: int | None, message: str) -> None:
        report = report_of(error, 0)
        assert (report.rank, report.message) == (rank, message)

    @pytest.mark.parametrize("text", ["", "{", '{"message": "text"}', "[1]", '{"message": {"extraInfo": {}}}'])
    def test_half_of_one(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "error.json").write_text(text)
        assert read_report(tmp_path / "error.json") is None
