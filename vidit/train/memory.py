"""Peak memory of a run: this process and every worker under it, which `getrusage` does not see.

Workers are children of a fork server that outlives them, so no parent ever waits for them. A thread adds up
the resident memory of the whole tree twice a second; pages that processes share are counted in each.
"""

import threading
from types import TracebackType
from typing import Self

import psutil

INTERVAL_S = 0.5


class PeakMemory:
    """While entered, watches the resident memory of the process tree; `peak_gib` is the largest seen."""

    def __init__(self, interval_s: float = INTERVAL_S):
        self.peak_bytes = 0
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def peak_gib(self) -> float:
        return self.peak_bytes / 2**30

    def __enter__(self) -> Self:
        self.look()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.look()
        self._stop.set()
        self._thread.join()

    def look(self) -> None:
        """Measure now."""
        own = psutil.Process()
        total = 0
        for process in (own, *own.children(recursive=True)):
            try:
                total += process.memory_info().rss
            except psutil.Error:  # it ended in between
                continue
        self.peak_bytes = max(self.peak_bytes, total)

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.look()
