"""A clip at a glance: five frames side by side, as a JPEG for a page."""

from __future__ import annotations

import base64
import io

import numpy as np

from vidit.data.curation.frames import streamed
from vidit.data.limits import ClipError
from vidit.data.shards import ClipRef, read_clip

NUM_FRAMES, SIDE = 5, 84


def strip_of(ref: ClipRef) -> tuple[str, str]:
    """(JPEG in base64, caption); no picture where the clip does not decode."""
    from PIL import Image

    caption = ""
    try:
        video, caption, _ = read_clip(ref)
        with streamed(video) as stream:
            numbers = stream.shown_at([(i + 0.5) / NUM_FRAMES for i in range(NUM_FRAMES)])
            pictures = {frame.index: frame.picture(SIDE) for frame in stream if frame.index in numbers}
    except ClipError:
        return "", caption
    shown = [pictures[number] for number in numbers if number in pictures]
    gap = np.full((shown[0].shape[0], 2, 3), 255, np.uint8) if shown else None
    if gap is None or len({image_HWC.shape for image_HWC in shown}) > 1:
        return "", caption
    row_HWC = np.concatenate([part for image_HWC in shown for part in (image_HWC, gap)][:-1], axis=1)
    buffer = io.BytesIO()
    Image.fromarray(row_HWC).save(buffer, "JPEG", quality=78)
    return base64.b64encode(buffer.getvalue()).decode(), caption
