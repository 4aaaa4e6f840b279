"""All scores of one clip, in one pass over its frames."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vidit.data.curation.cuts import CutFinder
from vidit.data.curation.duplicates import FRACTIONS, clip_hash
from vidit.data.curation.frames import FrameStream, streamed
from vidit.data.curation.motion import MotionMeter
from vidit.data.curation.plugin import load_plugin
from vidit.data.curation.rows import Row, rounded, video_of
from vidit.data.curation.stills import still_scores
from vidit.data.limits import ClipError
from vidit.data.shards import ClipRef, read_clip

VERSION = "2"
"""Of the scores below: raised when one of them comes out different, so that stored ones are computed anew."""
BUILT_IN = f"vidit@{VERSION}"
NUM_STILLS = 9
MOVING_SIDE, STILL_SIDE = 120, 480
"""Short sides in pixels: of every frame for cuts and flow, of stills."""


Task = tuple[ClipRef, tuple[str, ...], bool]
"""A clip, plug-ins by name, whether our own scores are wanted too."""


def score_clip(task: Task) -> Row:
    """The scores of a clip.

    A clip that cannot be decoded gives a row with its fault. RuntimeError from a plug-in, ShardError.
    """
    import cv2

    ref, plugins, built_in = task
    # Workers are the parallelism, and threads would make sums depend on the machine.
    cv2.setNumThreads(1)
    try:
        video, caption, _ = read_clip(ref)
        with streamed(video) as stream:
            return _scored(ref, stream, caption, plugins, built_in)
    except ClipError as error:
        return Row(ref.key, video_of(ref), {BUILT_IN: {}}, fault=str(error))


def unscored(task: Task) -> Row:
    """Of a clip on which the decoder or a plug-in ends its process, each time."""
    ref, plugins, _ = task
    among = f" (or one of {' '.join(plugins)})" if plugins else ""
    fault = f"scoring it ended the process, twice: the decoder{among} crashed, or had too little memory"
    return Row(ref.key, video_of(ref), {BUILT_IN: {}}, fault=fault)


def _scored(ref: ClipRef, stream: FrameStream, caption: str, plugins: Sequence[str], built_in: bool) -> Row:
    numbers = stream.shown_at([(i + 0.5) / NUM_STILLS for i in range(NUM_STILLS)])
    hashed = stream.shown_at(FRACTIONS)
    wanted, stills = {*numbers, *hashed}, dict[int, NDArray[np.uint8]]()
    cuts, motion, shape = CutFinder(ref.fps), MotionMeter(), None
    for frame in stream:
        shape = shape or frame.shape
        if frame.shape != shape:
            raise ClipError(f"the picture changes from {shape} to {frame.shape} pixels at frame {frame.index}")
        if frame.index in wanted:
            stills[frame.index] = frame.picture(STILL_SIDE)
        if built_in:
            image_HWC = frame.picture(MOVING_SIDE)
            motion.add(frame.time_s, image_HWC, cuts.add(frame.index, image_HWC))
    if lost := sorted(wanted - set(stills)):
        raise ClipError(f"frame {lost[0]} of {stream.num_frames} does not decode")
    pictures = [stills[number] for number in dict.fromkeys(numbers)]
    by = {}
    if built_in:
        by[BUILT_IN] = _facts(ref, stream) | cuts.scores() | motion.scores() | still_scores(pictures)
    for plugin in map(load_plugin, plugins):
        by[plugin.scorer] = plugin(np.stack(pictures), caption, ref.key)
    by = {scorer: {name: rounded(value) for name, value in scores.items()} for scorer, scores in by.items()}
    if not built_in:
        return Row(ref.key, video_of(ref), by)
    digest = f"{clip_hash([stills[number] for number in hashed]):048x}"
    return Row(ref.key, video_of(ref), by, cut_frames=tuple(cuts.frames), hash=digest)


def _facts(ref: ClipRef, stream: FrameStream) -> dict[str, float]:
    """What needs no look at the pixels."""
    num_pixels = ref.width * ref.height * stream.num_frames
    return {
        "duration_s": stream.duration_s,
        "num_frames": stream.num_frames,
        "fps": ref.fps,
        "width": ref.width,
        "height": ref.height,
        "aspect": ref.width / ref.height,
        "bits_per_pixel": 8 * ref.video_size / num_pixels,
    }
