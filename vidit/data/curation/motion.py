"""How much a clip moves, how long it stands still, and how much it shakes, from dense optical flow.

Stable Video Diffusion (2311.15127, appendix C) scores motion by Farneback's flow at 2 frames a second. Over half
a second things move farther than Farneback's search reaches (an eighth of the width), and fast motion comes out as
little. So the flow is sampled twice a second, as there, but taken between frames about 1/12 s apart, three at
a time: the two flows of such a burst also tell whether the picture turned back, which is shake.

Farneback, not the faster DIS: on a flat wall with sensor noise DIS reports 5 pixels of motion, Farneback 0.01.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

BURST_EVERY_S = 0.5
BURST_FRAMES = 3
STEP_S = 1 / 12
STATIC_BELOW = 1.0
"""Percent of the short side a second: sensor noise reads as a third of that."""
_GRACE_S = 2e-3
"""Containers round timestamps to milliseconds."""


@dataclass(slots=True)
class MotionMeter:
    """Takes frames in order, gives scores at the end. Speeds are in percent of the short side a second."""

    _burst: list[tuple[float, NDArray[np.uint8]]] = field(default_factory=list)
    _next_s: float = 0.0
    _speeds: list[float] = field(default_factory=list)
    _reversals: list[float] = field(default_factory=list)

    def add(self, time_s: float, image_HWC: NDArray[np.uint8], is_cut: bool) -> None:
        """One frame, RGB; frames that no burst needs cost nothing. No burst spans a cut."""
        import cv2

        if is_cut:
            self._close()
        elif time_s < (self._burst[-1][0] + STEP_S if self._burst else self._next_s) - _GRACE_S:
            return
        if not self._burst:
            self._next_s = time_s + BURST_EVERY_S
        self._burst.append((time_s, np.asarray(cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY), dtype=np.uint8)))
        if len(self._burst) == BURST_FRAMES:
            last = self._burst[-1]
            self._close()
            if time_s >= self._next_s - _GRACE_S:  # few frames a second: each pair of neighbours counts
                self._burst, self._next_s = [last], time_s + BURST_EVERY_S

    def _close(self) -> None:
        """Measure the burst so far, and be ready for the next."""
        velocities = []
        for (start_s, before), (end_s, after) in pairwise(self._burst):
            scale = 100 / min(before.shape) / (end_s - start_s)
            flow_HW2 = _flow(before, after) * scale
            self._speeds.append(float(np.linalg.norm(flow_HW2, axis=-1).mean()))
            velocities.append(np.median(flow_HW2, axis=(0, 1)))  # of the picture: what moves in it is less than half
        for first, second in pairwise(velocities):
            slower = float(min(np.linalg.norm(first), np.linalg.norm(second)))
            self._reversals.append(slower if first @ second < 0 else 0.0)
        self._burst = []

    def scores(self) -> dict[str, float]:
        """``motion`` mean speed; ``static`` share of flows below ``STATIC_BELOW``; ``jitter`` speed turned back."""
        self._close()
        speeds = np.array(self._speeds or [0.0])
        return {
            "motion": float(speeds.mean()),
            "static": float((speeds < STATIC_BELOW).mean()),
            "jitter": float(np.mean(self._reversals or [0.0])),
        }


def _flow(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pixels (x, y) from each point of one frame to where it is in the next: (H, W, 2)."""
    import cv2

    blank = np.zeros((*before.shape, 2), np.float32)
    flow_HW2 = cv2.calcOpticalFlowFarneback(
        before, after, blank, pyr_scale=0.5, levels=4, winsize=15, iterations=3, poly_n=5, poly_sigma=1.2, flags=0
    )
    return np.asarray(flow_HW2, dtype=np.float32)
