"""When each frame of a video track is on screen, and which frames a window of it shows.

Time comes from presentation timestamps only, never from a frame counter or from the header's rate, so files
with a variable frame rate come out right.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction

from vidit.data.limits import TooShortError


@dataclass(frozen=True, slots=True)
class PacketTimes:
    """Times of one packet, in ticks."""

    pts: int | None
    dts: int | None
    duration: int
    is_key: bool

    def seek_point(self) -> tuple[int, int]:
        """(pts, earliest timestamp to seek to): containers index by either time, and too early is only slower."""
        pts = self.pts or 0
        return pts, pts if self.dts is None else min(pts, self.dts)


@dataclass(frozen=True, slots=True)
class Timeline:
    """Instants of all shown frames, in ticks of the track's time base."""

    pts: list[int]
    """When each frame appears, ascending."""
    end: int
    """When the last frame disappears."""
    tick_s: Fraction
    keys: list[tuple[int, int]]
    """(pts, earliest timestamp to seek to) of every frame that decoding can start from, ascending."""

    @property
    def duration_s(self) -> float:
        return float((self.end - self.pts[0]) * self.tick_s)

    @property
    def front(self) -> int:
        """Where to seek to so that decoding reaches every frame."""
        return self.keys[0][1]

    def key_before(self, pts: int) -> tuple[int, int]:
        """Where to seek to so that decoding reaches the frame at ``pts``: what should do, and what is on the safe side.

        A container's index goes by one time or the other. With B-frames the safe one, the decoding time, lies
        before the key frame's pts, and a seek by pts that is given it lands on the key frame before.
        """
        return self.keys[max(0, bisect_right(self.keys, pts, key=lambda key: key[0]) - 1)]

    def window(self, num_frames: int, fps: float | None, start_fraction: float) -> list[int]:
        """The pts of the frame to show at each output instant; ClipError if the clip is too short."""
        if not fps:
            spare = len(self.pts) - num_frames
            if spare < 0:
                raise TooShortError(
                    f"too short: {len(self.pts)} frames at the file's own rate, {num_frames} are needed"
                )
            start = round(start_fraction * spare)
            return self.pts[start : start + num_frames]
        # Half a frame of grace: rates such as 29.97 for 30, and headers without the last frame's duration.
        num_available = int(self.duration_s * fps + 0.5)
        if num_available < num_frames:
            raise TooShortError(
                f"too short: {self.duration_s:.3f} s give {num_available} frames at {fps:g} fps, "
                f"{num_frames} are needed"
            )
        # Containers round timestamps to their tick (Matroska: 1 ms); without this slack a frame at its own
        # rate would at times count as not yet shown, and the one before it would be shown twice.
        slack_s = min(float(self.tick_s), 1e-3)
        spare_s = max(0.0, self.duration_s - num_frames / fps)
        start = self._shown(self.pts[0], start_fraction * spare_s + slack_s)
        return [self._shown(start, index / fps + slack_s) for index in range(num_frames)]

    def _shown(self, origin: int, seconds: float) -> int:
        return self.pts[bisect_right(self.pts, origin + seconds / float(self.tick_s)) - 1]
