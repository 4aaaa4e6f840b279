"""Trying again what a network may refuse now and grant later: exponential back-off with jitter, within a budget.

The budget counts from the last byte that arrived: a long file over a poor line gets there as long as each try
brings something, and a dead server is given up after ``patience_s``, however the tries fail. A server that sends a
byte now and then is given up too: a read as a whole may take ``patience_s`` and its bytes at ``LEAST_RATE``.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import TypeVar

from vidit.data.limits import StorageError

LEAST_RATE = 64 * 1024
"""Bytes a second below which a storage counts as dead."""
MAX_TRIES = 40
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 30.0
_T = TypeVar("_T")


class TransientError(Exception):
    """A failure that another try may not meet; ``after_s`` is how long the server asks to be left alone."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


async def persist(
    attempt: Callable[[float], Awaitable[_T]],
    what: str,
    stall_s: float,
    patience_s: float,
    arrived: Callable[[], int] = lambda: 0,
    num_bytes: int = 0,
) -> _T:
    """The result of ``attempt(seconds to wait for the next byte)``, tried again after each TransientError.

    ``arrived`` counts the bytes that have come so far, of ``num_bytes``. Raises StorageError when the budget is used
    up, and at once whatever else ``attempt`` raises.
    """
    began = since = monotonic()
    tries = total = 0
    last = "none"

    def spent() -> StorageError:
        return StorageError(
            f"{what} cannot be read: {total} tries in {monotonic() - began:.0f} s, the last: {last}; check the server "
            f"and the network, or raise data.patience_s={patience_s:g}"
        )

    try:
        async with asyncio.timeout(patience_s + num_bytes / LEAST_RATE):
            while True:
                before = arrived()
                total += 1
                try:
                    return await attempt(min(stall_s, max(since + patience_s - monotonic(), 0.05)))
                except TransientError as error:
                    last, asked = str(error), error.after_s
                if arrived() > before:
                    tries, since = 0, monotonic()
                tries += 1
                # Full jitter: many ranks that were refused together must not come back together.
                pause = max(asked, random.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**tries)))
                if tries >= MAX_TRIES or monotonic() + pause > since + patience_s:
                    raise spent()
                await asyncio.sleep(pause)
    except TimeoutError:
        raise spent() from None
