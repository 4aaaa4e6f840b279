"""What a start leaves for those who would start it again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.marker import ATTEMPT, FAILED, FILE, fails_again, failures_noted, is_done
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


@pytest.mark.parametrize(
    ("text", "done"),
    [('{"attempt": "001/0.1", "done": true}', True), ('{"attempt": "001/0.1", "done": false}', False),
     ('{"attempt": "001/0.2", "done": true}', False), ("[1]", False), ("{", False)],
)  # fmt: skip
def test_only_the_word_of_this_start_counts(tmp_path: Path, text: str, done: bool) -> None:
    assert not is_done(tmp_path, "001/0.1")
    (tmp_path / FILE).write_text(text)
    assert is_done(tmp_path, "001/0.1") == done
