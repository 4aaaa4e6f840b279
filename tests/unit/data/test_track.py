"""What one open track leaves behind: nothing, however little of it was read."""

from __future__ import annotations

import gc

import numpy as np

from tests.native_heap import heap, needs_mallinfo
from vidit.data.encode import encode_mp4
from vidit.data.video import decode_clip


def allocated_bytes() -> int:
    """What native code holds: Python's own counters do not see FFmpeg's memory."""
    gc.collect()
    return heap("uordblks")


@needs_mallinfo
def test_decoding_a_window_leaves_no_memory_behind() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    video, held = encode_mp4(frames, 8), []
    for _ in range(4):
        for _ in range(500):
            decode_clip(video, num_frames=1, fps=0, height=16, width=16)
        held.append(allocated_bytes())
    # One packet kept of each clip is 150 bytes; the first rounds also fill caches.
    growth = (held[-1] - held[1]) / 1000
    assert growth < 50, f"{growth:.0f} bytes stay behind of each clip: {held}"
