"""Hard cuts within a clip, by PySceneDetect's ContentDetector (mean change of hue, saturation and value).

No shortest scene is asked for: a clip that was cut out badly has its cut a few frames from its end. A flash of light
therefore counts as two cuts.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

THRESHOLD = 27.0


class CutFinder:
    """Takes frames in order; ``frames`` are the numbers of those that begin a new scene."""

    def __init__(self, fps: float) -> None:
        # Not at the top: importing the package starts a process to look for ffmpeg.
        from scenedetect import FrameTimecode, StatsManager
        from scenedetect.detectors import ContentDetector

        self._timecode = functools.partial(FrameTimecode, fps=fps)
        self._detector = ContentDetector(threshold=THRESHOLD, min_scene_len=0)
        self._detector.stats_manager = self._stats = StatsManager()
        self._peak = 0.0
        self.frames: list[int] = []

    def add(self, index: int, image_HWC: NDArray[np.uint8]) -> bool:
        """Whether frame ``index``, RGB, begins a new scene."""
        import cv2

        timecode = self._timecode(index)
        is_cut = bool(self._detector.process_frame(timecode, np.asarray(cv2.cvtColor(image_HWC, cv2.COLOR_RGB2BGR))))
        (change,) = self._stats.get_metrics(timecode, [self._detector.FRAME_SCORE_KEY])
        self._peak = max(self._peak, float(change or 0.0))
        if is_cut:
            self.frames.append(index)
        return is_cut

    def scores(self) -> dict[str, float]:
        """``cuts``; ``cut_peak`` the largest change from one frame to the next (``THRESHOLD`` makes a cut)."""
        return {"cuts": len(self.frames), "cut_peak": self._peak}
