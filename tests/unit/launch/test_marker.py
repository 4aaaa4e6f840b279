"""What a start leaves for those who would start it again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.marker import ATTEMPT, FAILED, fails_again, failures_noted
from vidit.train.recovery import NonFiniteError


@pytest.mark.parametrize(
    ("error", "again"),
    [(NonFiniteError("nan"), True), (ValueError("no such key"), True), (RuntimeError("the network"), False),
     (OSError("disk"), False)],
)  # fmt: skip
def test_only_what_comes_again_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, again: bool
) -> None:
    monkeypatch.setenv(ATTEMPT, "001/7.0")
    with pytest.raises(type(error)), failures_noted(tmp_path):
        raise error
    assert fails_again(tmp_path, "001/7.0") == again
    assert not fails_again(tmp_path, "001/7.1"), "of another start"
    if again:
        assert json.loads((tmp_path / FAILED).read_text())["message"] == str(error)


def test_nothing_is_written_outside_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ATTEMPT, raising=False)
    with pytest.raises(ValueError, match="x"), failures_noted(tmp_path):
        raise ValueError("x")
    (tmp_path / FAILED).write_text("[1")
    assert not fails_again(tmp_path, "")
