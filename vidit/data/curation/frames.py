"""Every frame of a clip in the order it is shown, one at a time, each as a small upright picture when asked.

A score looks at a whole clip, which may be long and large: one decoded frame is held, and only what is asked for
becomes RGB, at the asked size. The limits on what a file may demand are those of training (`vidit/data/track.py`).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from vidit.data.limits import ClipError
from vidit.data.picture import picture_of, shown_size
from vidit.data.timeline import Timeline
from vidit.data.track import Track, opened

TIMEOUT_S = 600.0
"""Ten times what training allows a window: here a file is decoded from its first frame to its last."""


@dataclass(frozen=True, slots=True)
class ShownFrame:
    """One frame: its number, and when it appears, in seconds after the first."""

    index: int
    time_s: float
    _frame: VideoFrame
    _pixel_aspect: float
    _scaler: VideoReformatter

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in square pixels, upright."""
        return shown_size(self._frame, self._pixel_aspect)[::-1]

    def picture(self, max_short_side: int) -> NDArray[np.uint8]:
        """uint8 (H, W, 3), RGB, its short side at most ``max_short_side`` pixels; a smaller one stays as it is."""
        height, width = self.shape
        scale = min(1.0, max_short_side / min(width, height))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        image_HWC = picture_of(self._frame, self._scaler, self._pixel_aspect, size, (0.5, 0.5))
        return np.ascontiguousarray(image_HWC)


@dataclass(frozen=True, slots=True)
class FrameStream:
    """An open clip."""

    track: Track
    timeline: Timeline
    scaler: VideoReformatter = field(default_factory=VideoReformatter)

    @property
    def num_frames(self) -> int:
        return len(self.timeline.pts)

    @property
    def duration_s(self) -> float:
        return self.timeline.duration_s

    def shown_at(self, fractions: Sequence[float]) -> list[int]:
        """The number of the frame on screen at each fraction (0 to 1) of the clip's time."""
        first, end = self.timeline.pts[0], self.timeline.end
        instants = [first + fraction * (end - first) for fraction in fractions]
        return [bisect_right(self.timeline.pts, instant) - 1 for instant in instants]

    def __iter__(self) -> Iterator[ShownFrame]:
        """Raises ClipError where nothing decodes, where decoding fails, or where it takes too long."""
        pts_all, aspect, num_shown = self.timeline.pts, self.track.pixel_aspect(), 0
        for pts, frame in self.track.frames_from(self.timeline.front):
            time_s = float((pts - pts_all[0]) * self.timeline.tick_s)
            yield ShownFrame(bisect_left(pts_all, pts), time_s, frame, aspect, self.scaler)
            num_shown += 1
        if not num_shown:
            raise ClipError(f"no frame decodes, though the file holds {len(pts_all)} packets of video")


@contextmanager
def streamed(data: bytes | Path, timeout_s: float = TIMEOUT_S) -> Iterator[FrameStream]:
    """Open a video file for reading from front to end. ClipError as ``vidit.data.video.probe`` raises it."""
    with opened(data, timeout_s) as track:
        yield FrameStream(track, track.read_timeline())
