"""Video files: probe, verify and decode one clip, from bytes or from a path.

Contract: ``decode_clip`` gives exactly the frames that a viewer would see at the asked instants, upright,
with square pixels, cut to the asked size; or it raises ``ClipError`` with a reason that a report can print.
What is asked for decides what is decoded: from the key frame before the window to the last frame in it, less
the frames on which none of those builds. Only frames that are shown become RGB.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from vidit.data.limits import MAX_PIXELS, TIMEOUT_S, ClipError
from vidit.data.picture import orientation_of, picture_of, shown_size
from vidit.data.timeline import Timeline
from vidit.data.torchcodec_window import read_window
from vidit.data.track import Track, opened

Decoder = Literal["pyav", "torchcodec", "nvdec"]


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What one video track shows.

    ``width`` and ``height`` are in square pixels after rotation; ``num_frames`` counts the frames that are
    shown; ``fps`` is their mean rate; ``rotation`` is the angle by which a player turns the coded picture,
    in degrees counter-clockwise: 0, 90, 180 or 270.
    """

    width: int
    height: int
    fps: float
    num_frames: int
    duration_s: float
    codec: str
    rotation: int


def probe(data: bytes | Path, timeout_s: float = TIMEOUT_S) -> VideoInfo:
    """Read every packet's timestamp and decode one frame.

    Raises ClipError where ``decode_clip`` would whatever it is asked for; damage inside a later frame is what
    only ``verify`` finds.
    """
    with opened(data, timeout_s) as track:
        timeline = track.read_timeline()
        for _, frame in track.frames_from(timeline.front):
            return _info(track, frame, timeline)
        raise ClipError(f"no frame decodes, though the file holds {len(timeline.pts)} packets of video")


def verify(data: bytes | Path, timeout_s: float = TIMEOUT_S) -> VideoInfo:
    """Decode every frame once, as a proof that the clip can be used.

    Raises ClipError for all that ``probe`` finds, for frames that do not decode or decode damaged, and for a
    picture size that changes on the way.
    """
    with opened(data, timeout_s, strict=True) as track:
        timeline = track.read_timeline()
        num_decoded, first = 0, None
        for _, frame in track.frames_from(timeline.front):
            first = first or frame
            if (frame.width, frame.height) != (first.width, first.height):
                raise ClipError(
                    f"the picture changes from {first.width}x{first.height} to {frame.width}x{frame.height} "
                    f"at frame {num_decoded}"
                )
            if frame.is_corrupt:
                raise ClipError(f"frame {num_decoded} of {len(timeline.pts)} is damaged")
            num_decoded += 1
        if first is None or num_decoded < len(timeline.pts):
            raise ClipError(f"{num_decoded} frames decode of the {len(timeline.pts)} that the file holds")
        return _info(track, first, timeline)


def decode_clip(
    data: bytes | Path,
    *,
    num_frames: int,
    fps: float | None,
    height: int,
    width: int,
    start_fraction: float = 0.5,
    crop_fraction: tuple[float, float] = (0.5, 0.5),
    first_only: bool = False,
    timeout_s: float = TIMEOUT_S,
    decoder: Decoder = "pyav",
    device: str = "cuda",
) -> torch.Tensor:
    """Decode a window of a clip as uint8 (num_frames, height, width, 3), RGB; ``first_only`` its first frame.

    Output frame i is the frame on screen i/fps seconds after the window's start; ``fps`` of 0 or None takes
    consecutive frames of the file. The window starts at ``start_fraction`` (0 to 1) of the time that is left
    over, moved back to the start of the frame shown then. The picture is turned upright, made square in its
    pixels, resized until it covers the target and cut at ``crop_fraction`` (vertical, horizontal; 0 to 1) of
    what sticks out. The first video track that is not a cover picture is read. With ``decoder`` "torchcodec"
    or "nvdec" (on ``device``) these decode, and torch resizes: see ``vidit/data/torchcodec_window.py``.

    Raises ClipError for a file that does not open, has no video, no frames, fewer than ``num_frames`` at
    ``fps``, is truncated or damaged, exceeds MAX_PIXELS or MAX_FRAMES, or takes longer than ``timeout_s``
    (looked at between frames); ValueError for arguments out of range.
    """
    if min(num_frames, height, width) < 1 or height * width > MAX_PIXELS:
        raise ValueError(f"{num_frames} frames of {width}x{height} asked for; use 1 to {MAX_PIXELS} pixels")
    if fps is not None and not 0 <= fps <= 1000:
        raise ValueError(f"fps={fps} is outside 0 (the file's own rate) to 1000")
    if not all(0 <= fraction <= 1 for fraction in (start_fraction, *crop_fraction)):
        raise ValueError(f"start_fraction={start_fraction}, crop_fraction={crop_fraction}; use 0 to 1")
    with opened(data, timeout_s) as track:
        timeline = track.read_timeline()
        targets = timeline.window(num_frames, fps, start_fraction)[: 1 if first_only else None]
        if decoder == "pyav":
            return torch.from_numpy(_Window(track, timeline, targets, (height, width), crop_fraction).read())
        orientation = orientation_of(next(frame for _, frame in track.frames_from(timeline.front)))
        content = data if isinstance(data, bytes) else data.read_bytes()
        return read_window(
            content, track.stream.index, timeline, targets, orientation, track.pixel_aspect(), (height, width),
            crop_fraction, device if decoder == "nvdec" else "cpu",
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Window:
    """The frames shown at ``targets``, pts that ascend and may repeat, as pictures of ``size`` (height, width)."""

    track: Track
    timeline: Timeline
    targets: list[int]
    size: tuple[int, int]
    crop_fraction: tuple[float, float]
    scaler: VideoReformatter = field(default_factory=VideoReformatter)
    """One for all frames: to set it up costs more than to convert a small frame."""

    def read(self) -> NDArray[np.uint8]:
        out_THWC = np.empty((len(self.targets), *self.size, 3), np.uint8)
        start, safe_start = self.timeline.key_before(self.targets[0])
        if self._fill_exactly(out_THWC, start):
            return out_THWC
        # A key frame is a promise that some files break (intra refresh): the last try starts at the front.
        for begin in dict.fromkeys((safe_start, self.timeline.front)):
            if self._fill(out_THWC, begin):
                return out_THWC
        when_s = float(self.targets[0] * self.timeline.tick_s)
        raise ClipError(f"nothing decodes at {when_s:.2f} s; the file is damaged")

    def _fill_exactly(self, out_THWC: NDArray[np.uint8], start: int) -> bool:
        """Decode as few frames as can be; False where that does not give each target, as in a damaged file."""
        missing = set(self.targets)
        for pts, frame in self.track.frames_from(start, frozenset(missing)):
            if pts in missing:
                missing.remove(pts)
                out_THWC[bisect_left(self.targets, pts) : bisect_right(self.targets, pts)] = self._picture(frame)
            if not missing:
                return True
        return False

    def _fill(self, out_THWC: NDArray[np.uint8], start: int) -> bool:
        """Decode every frame, as a player does; False where decoding starts after the first target."""
        filled, shown, pts = 0, None, 0
        for pts, frame in self.track.frames_from(start):
            # A frame that did not decode leaves the one before it on screen, as in a player.
            for image, until in ((shown, pts - 1), (frame, pts)):
                ready = bisect_right(self.targets, until, lo=filled)
                if ready == filled:
                    continue
                if image is None:
                    return False
                out_THWC[filled:ready] = self._picture(image)
                filled = ready
            if filled == len(self.targets):
                return True
            shown = frame
        if shown is None:
            return False
        tick_s = float(self.timeline.tick_s)
        raise ClipError(
            f"truncated or damaged: the last frame that decodes is at {pts * tick_s:.2f} s, "
            f"one at {self.targets[filled] * tick_s:.2f} s is needed"
        )

    def _picture(self, frame: VideoFrame) -> NDArray[np.uint8]:
        return picture_of(frame, self.scaler, self.track.pixel_aspect(), self.size, self.crop_fraction)


def _info(track: Track, frame: VideoFrame, timeline: Timeline) -> VideoInfo:
    width, height = shown_size(frame, track.pixel_aspect())
    num_frames = len(timeline.pts)
    fps, header_fps = num_frames / timeline.duration_s, float(track.stream.average_rate or 0)
    # Timestamps are rounded to ticks: the header's exact rate is better where the two agree.
    fps = header_fps if abs(header_fps - fps) < 0.005 * fps else fps
    codec, rotation = track.stream.codec_context.name, orientation_of(frame).rotation
    return VideoInfo(width, height, fps, num_frames, timeline.duration_s, codec, rotation)
