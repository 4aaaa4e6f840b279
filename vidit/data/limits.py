"""What one video may ask of the machine, and the errors that refuse a video, a shard or a storage."""

from __future__ import annotations

MAX_PIXELS = 8192 * 4320
"""Largest picture that is decoded or made on the way: 8K."""
TIMEOUT_S = 60.0


class ClipError(ValueError):
    """A clip that cannot be used; ``reason`` says why in words fit for a report."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TooShortError(ClipError):
    """A clip with fewer frames than are asked for: nothing is wrong with it."""


class ShardError(ValueError):
    """A shard, index or manifest that cannot be used; the message names the file and the cure."""


class StorageError(RuntimeError):
    """A remote file that could not be read however often it was tried; the message says how often and how long."""


def check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ClipError(f"{width}x{height} pixels exceed the limit of {MAX_PIXELS}")
