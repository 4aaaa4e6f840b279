"""Signals that ask a run to save and leave: SIGTERM, SIGUSR1, SIGUSR2, and Ctrl-C."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

from parallel.exchange import any_rank

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StoppedError(Exception):
    """Long work was left half done because a signal asked for it."""


class StopRequest:
    """While entered, remembers the first signal instead of dying of it; a second Ctrl-C is not held back."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise StoppedError if a signal has come to any rank: for work that all ranks do in the same order."""
        if any_rank(self.signal is not None):
            raise StoppedError

    def check_alone(self) -> None:
        """The same for work that this rank does by itself, at every place where it may be left."""
        if self.signal is not None:
            raise StoppedError

    def _remember(self, number: int, _: FrameType | None) -> None:
        if self.signal is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
