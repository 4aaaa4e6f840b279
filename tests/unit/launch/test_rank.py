"""Signals of a rank before its run takes them, and the locks by which launcher and ranks see each other."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from launch.rank import SIGNALS, HeldSignals, is_held
from vidit.train.stop import SIGNALS as OF_A_RUN
from vidit.train.stop import StopRequest


@pytest.fixture
def held() -> Iterator[HeldSignals]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield HeldSignals()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_signals_are_those_of_a_run() -> None:
    assert SIGNALS == OF_A_RUN


def test_a_signal_waits_for_the_run(held: HeldSignals) -> None:
    os.kill(os.getpid(), signal.SIGUSR1)
    held.hand_on()
    assert held.number == signal.SIGUSR1
    with StopRequest() as stop:
        assert stop.signal is None
        held.hand_on()
        assert stop.signal is signal.SIGUSR1
    assert held.number is None
    held.hand_on()


def test_what_nobody_takes_ends_the_process(held: HeldSignals, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr("launch.rank.os._exit", codes.append)
    os.kill(os.getpid(), signal.SIGTERM)
    held.hand_on()
    assert codes == []
    monkeypatch.setattr("launch.rank.HOLD_S", 0.0)
    held.hand_on()
    assert codes == [128 + signal.SIGTERM]


def test_only_the_signal_that_came_is_handed_on(held: HeldSignals) -> None:
    came: list[int] = []

    def take(number: int, _: FrameType | None) -> None:
        came.append(number)

    signal.signal(signal.SIGUSR1, take)
    held.hand_on()
    assert came == []


def test_locks(tmp_path: Path) -> None:
    path = tmp_path / "rank-0"
    assert not is_held(path), "no file"
    with path.open("w") as file:
        assert not is_held(path)
        fcntl.flock(file, fcntl.LOCK_EX)
        assert is_held(path)
    assert not is_held(path)
