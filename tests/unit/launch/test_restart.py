"""Whether a failure is worth another start."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.ending import Ending
from launch.restart import Restarts, newest_step
from parallel.failure import RankError, may_pass
from vidit.config import ConfigError
from vidit.train.recovery import NonFiniteError
from vidit.train.skips import SkipLimitError

KILLED = Ending(1, "ended by SIGKILL", 137)


def save(folder: Path, step: int) -> None:
    (folder / f"step-{step:08d}").mkdir(parents=True)
    (folder / f"step-{step:08d}" / "manifest.json").write_text("{}")


def test_the_newest_that_is_whole(tmp_path: Path) -> None:
    assert newest_step(tmp_path / "none") == -1
    save(tmp_path, 20)
    save(tmp_path, 100)
    (tmp_path / "step-00000200.partial").mkdir()
    (tmp_path / "step-00000200.partial" / "manifest.json").write_text("{}")
    (tmp_path / "step-00000300").mkdir()
    assert newest_step(tmp_path) == 100


def test_failures_in_a_row_without_a_checkpoint(tmp_path: Path) -> None:
    restarts = Restarts(2, tmp_path)
    restarts.begin()
    assert [restarts.decide(KILLED, False).again for _ in range(2)] == [True, True]
    save(tmp_path, 5)
    assert restarts.decide(KILLED, False) == (
        True,
        "starting again from the checkpoint of step 5, 1 of launch.max_restarts=2",
    )
    assert restarts.decide(KILLED, False).again
    assert restarts.decide(KILLED, False) == (False, "3 failures since the checkpoint of step 5")
    assert restarts.total == 4


def test_an_old_checkpoint_is_no_progress(tmp_path: Path) -> None:
    save(tmp_path, 5)
    restarts = Restarts(1, tmp_path)
    restarts.begin()
    assert restarts.decide(KILLED, False).again
    assert not restarts.decide(KILLED, False).again


@pytest.mark.parametrize(
    ("ending", "stop", "why"),
    [
        (KILLED, True, "a stop was asked for"),
        (Ending(0, "interrupted", 130), False, "a stop was asked for"),
        (Ending(0, "no such key", 1, retry=False), False, "it would fail again"),
    ],
)
def test_never(tmp_path: Path, ending: Ending, stop: bool, why: str) -> None:
    restarts = Restarts(9, tmp_path)
    restarts.begin()
    assert restarts.decide(ending, stop) == (False, why)


def test_none_without_a_budget(tmp_path: Path) -> None:
    restarts = Restarts(0, tmp_path)
    restarts.begin()
    assert not restarts.decide(KILLED, False).again


@pytest.mark.parametrize(
    ("error", "retry"),
    [
        (ValueError("no such key"), False), (ConfigError(["a", "b"]), False), (NonFiniteError("nan"), False),
        (SkipLimitError("too many"), False), (KeyboardInterrupt(), False), (OSError(28, "no space"), True),
        (RuntimeError("CUDA error"), True), (RankError(1, "gives no sign of life"), True), (MemoryError(), True),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_which_errors_may_pass(error: BaseException, retry: bool) -> None:
    assert may_pass(error) is retry
