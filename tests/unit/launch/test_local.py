"""How a local launch is rendered, and how it finds out why it failed. No process is started here."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from launch.local import Failure, Rank, find_failure, render
from launch.rank import Place, is_held
from parallel.failure import RankError, read_report, report_of, write_report

# What torchrun writes of one failed worker; its layout is what `find_failure` reads codes from.
SEEN = """[{index}]:
  time      : 2026-11-26_20:50:26
  host      : localhost
  rank      : {rank} (local_rank: {rank})
  exitcode  : {code} (pid: 77{rank})
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
"""


def test_golden() -> None:
    command = ["-m", "vidit.cli", "train", "configs.demo", "launch.local=4", "name=a b"]
    rendered = render(command, 4, Path("/tmp/launch"), {"HOME": "/root"}, 10, python="/usr/bin/python3")
    assert rendered.argv == (
        "/usr/bin/python3", "-m", "torch.distributed.run",
        "--standalone", "--local-addr=127.0.0.1", "--nnodes=1", "--nproc-per-node=4", "--max-restarts=0",
        "--log-dir=/tmp/launch/torch",
        "-m", "vidit.cli", "train", "configs.demo", "launch.local=4", "name=a b",
    )  # fmt: skip
    assert rendered.environment == {
        "VIDIT_LAUNCH": "/tmp/launch",
        "OMP_NUM_THREADS": "2",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


def test_the_user_decides_on_threads_and_warnings() -> None:
    said = {"OMP_NUM_THREADS": "7", "TORCH_CPP_LOG_LEVEL": "INFO", "VIDIT_LAUNCH": "/old"}
    assert render(["x.py"], 4, Path("/new"), said, 10).environment == {"VIDIT_LAUNCH": "/new"}


def test_more_ranks_than_cores() -> None:
    assert render(["x.py"], 8, Path("/new"), {}, 2).environment["OMP_NUM_THREADS"] == "1"


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


def leave(folder: Path, rank: int, error: BaseException, time: float) -> None:
    path = folder / "torch" / "id" / "attempt_0" / str(rank) / "error.json"
    path.parent.mkdir(parents=True)
    report = report_of(error, rank)
    write_report(path, type(report)(report.rank, report.message, report.trace, time))


class TestFailure:
    def test_the_first_report(self, tmp_path: Path) -> None:
        leave(tmp_path, 0, RankError(2, "no such clip, they say"), 11.0)
        leave(tmp_path, 2, ValueError("no such clip"), 10.0)
        log = SEEN.format(index=0, rank=0, code=1) + SEEN.format(index=1, rank=2, code=3)
        found = find_failure(tmp_path, log, 1)
        assert (found.rank, found.message, found.code) == (2, "no such clip", 3)

    def test_a_killed_rank_is_the_cause(self, tmp_path: Path) -> None:
        """Another survivor may have been first, with a worse guess."""
        leave(tmp_path, 0, RankError(1, "gives no sign of life"), 10.0)
        leave(tmp_path, 3, RankError(2, "gives no sign of life, last in data"), 11.0)
        log = SEEN.format(index=0, rank=2, code=-9) + SEEN.format(index=1, rank=1, code=-15)
        found = find_failure(tmp_path, log, 1)
        assert (found.rank, found.code) == (2, 128 + signal.SIGKILL)
        assert found.message == "ended by SIGKILL: gives no sign of life, last in data"

    @pytest.mark.parametrize(
        ("process", "how"), [(771, "did not leave when asked, so it was killed"), (770, "ended by SIGKILL")]
    )
    def test_a_rank_that_torchrun_had_to_kill(self, tmp_path: Path, process: int, how: str) -> None:
        """Stopped, not killed: the SIGKILL came at the end. Of another rank that line says nothing."""
        leave(tmp_path, 0, RankError(1, "gives no sign of life"), 10.0)
        forced = f"W Unable to shutdown process {process} via Signals.SIGTERM, forcefully exiting via Signals.SIGKILL\n"
        found = find_failure(tmp_path, forced + SEEN.format(index=0, rank=1, code=-9), 1)
        assert found.message == f"{how}: gives no sign of life"

    def test_no_report(self, tmp_path: Path) -> None:
        found = find_failure(tmp_path, SEEN.format(index=0, rank=1, code=-11), 1)
        assert found == Failure(1, "ended by SIGSEGV without a message", 139, "")
        found = find_failure(tmp_path, SEEN.format(index=0, rank=1, code=7), 1)
        assert found == Failure(1, "ended with exit code 7 without a message", 7, "")

    def test_torchrun_itself(self, tmp_path: Path) -> None:
        found = find_failure(tmp_path, "Traceback\nImportError: no torch\n", 1)
        assert found == Failure(None, "torchrun ended with exit code 1: ImportError: no torch", 1, "")
        assert find_failure(tmp_path, "", -9).code == 137

    def test_nobody_is_at_fault(self, tmp_path: Path) -> None:
        leave(tmp_path, 0, RankError(None, "none is behind"), 10.0)
        assert find_failure(tmp_path, "", 1)[:3] == (None, "none is behind", 1)


def test_a_rank_that_has_not_begun(tmp_path: Path) -> None:
    rank = Rank(tmp_path / "rank-0")
    assert rank.process() is None
    assert not rank.is_done()
    (tmp_path / "rank-0").write_text("4711\n")  # and nobody holds its lock: it is over, and not done
    assert not is_held(tmp_path / "rank-0")
    assert rank.process() is None
    assert not rank.is_done()
