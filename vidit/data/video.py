"""Video files in and out: encode, probe, verify and decode one clip, from bytes or from a path.

Contract: ``decode_clip`` gives exactly the frames that a viewer would see at the asked instants, upright,
with square pixels, cut to the asked size; or it raises ``ClipError`` with a reason that a report can print.
Time comes from presentation timestamps only, never from a frame counter or from the header's rate, so files
with a variable frame rate come out right. Nothing that arrives here is trusted: only four container formats
are opened, no other file or address can be reached through one (playlists, references), sizes, frame counts
and running time are bounded, and one decoded frame is held at a time.

Resizing is libswscale's bicubic, in the same pass as YUV to RGB. It widens its kernel when it shrinks, so it
is antialiased (0.23 grey levels from Pillow's bicubic on average, torch 0.9, libswscale area 0.5), and costs
2.0 ms for 720p to 228x128 where torch takes 2.1 ms and holds a full-size RGB copy. The three flags cost a
quarter of that: without them white comes out as 253 and the result depends on the CPU's vector unit.
"""

from __future__ import annotations

import errno
import io
import struct
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, cast

import av
import numpy as np
import torch
from av.container import InputContainer
from av.sidedata.sidedata import SideData
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

MAX_PIXELS = 8192 * 4320
"""Largest picture that is decoded or made on the way: 8K."""
MAX_FRAMES = 200_000
"""Longest file that is read, about two hours: what trains is cut into clips first."""
MAX_PIXEL_ASPECT = 16
TIMEOUT_S = 60.0

FORMATS = "mov,matroska,avi,asf"
_SCALER = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INT
# A lookahead of 8 frames costs a fifth less time than the preset's 10 to 20 and gives the same size.
_X264 = {"preset": "veryfast", "rc-lookahead": "8"}
_AVCOL_UNSPECIFIED = 2
_AVCOL_BT709 = 1

_FAULTS = (av.FFmpegError, OSError, ValueError)

Frames = NDArray[np.uint8] | torch.Tensor


class ClipError(ValueError):
    """A clip that cannot be used; ``reason`` says why in words fit for a report."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


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


@dataclass(frozen=True, slots=True)
class _Orientation:
    """Display matrix as array operations: transpose first, then the flips."""

    transpose: bool = False
    flip_rows: bool = False
    flip_cols: bool = False

    @property
    def rotation(self) -> int:
        if self.transpose:
            return 90 if self.flip_rows else 270
        return 180 if self.flip_rows and self.flip_cols else 0

    def apply(self, image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if self.transpose:
            image_HWC = image_HWC.transpose(1, 0, 2)
        return image_HWC[:: -1 if self.flip_rows else 1, :: -1 if self.flip_cols else 1]


def encode_mp4(frames: Frames, fps: float, crf: int = 18) -> bytes:
    """Encode frames as H.264 in an in-memory mp4; the same frames always give the same bytes.

    ``frames``: uint8 (T, H, W, 3), RGB. An odd height or width gains one repeated row or column, because
    4:2:0 chroma needs even sizes. BT.709, limited range, tagged as such. The index stands before the data,
    and key frames at least every 32 frames keep random access cheap. Raises ValueError for a wrong array,
    rate or crf.
    """
    frames_THWC = _checked_frames(frames)
    if not 0 < fps <= 1000:
        raise ValueError(f"fps={fps} cannot be encoded; use a rate above 0 and up to 1000")
    if not 0 <= crf <= 51:
        raise ValueError(f"crf={crf} is outside 0 (lossless) to 51 (worst)")
    num_frames, height, width, _ = frames_THWC.shape
    frames_THWC = np.pad(frames_THWC, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    # 36 bytes a frame bounds the sample tables: with room kept, the index lands in front, as with +faststart,
    # which needs a file name to read the output back.
    options = {"fflags": "+bitexact", "moov_size": str(1024 + 36 * num_frames)}
    with av.open(buffer, "w", format="mp4", options=options) as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options=_X264 | {"crf": str(crf)})
        context = stream.codec_context
        context.height, context.width = frames_THWC.shape[1:3]
        context.pix_fmt = "yuv420p"
        context.thread_count = 1  # x264 cuts slices by thread count, so the bytes would depend on the machine
        context.gop_size, context.max_b_frames = 32, 0
        context.colorspace = context.color_primaries = context.color_trc = _AVCOL_BT709
        context.color_range = ColorRange.MPEG
        scaler = VideoReformatter()
        for image_HWC in frames_THWC:
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(image_HWC), "rgb24")
            container.mux(stream.encode(_to_yuv(scaler, frame)))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _to_yuv(scaler: VideoReformatter, frame: VideoFrame) -> VideoFrame:
    return scaler.reformat(
        frame,
        format="yuv420p",
        interpolation=_SCALER,
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        threads=1,
    )


def write_gif(path: Path | BinaryIO, frames: Frames, fps: float, scale: int = 1) -> None:
    """Write a looping GIF. ``frames``: uint8 (T, H, W, 3); ``scale`` repeats every pixel that many times.

    One palette of 256 colours is fitted to the whole clip, so colours do not flicker from frame to frame.
    GIF counts in 10 ms: the delays alternate so that the mean rate is right, and players run no faster than
    50 frames/s. Raises ValueError for a wrong array, rate or scale.
    """
    from PIL import Image

    frames_THWC = _checked_frames(frames)
    if not 0 < fps <= 50:
        raise ValueError(f"fps={fps} cannot be shown by a GIF; use a rate above 0 and up to 50")
    if scale < 1:
        raise ValueError(f"scale={scale} is not a positive whole number")
    num_frames, height, width, _ = frames_THWC.shape
    # 64 frames spread over the clip carry its colours, and bound the time that the palette takes.
    chosen = np.unique(np.linspace(0, num_frames - 1, 64).round().astype(int))
    mosaic = Image.fromarray(np.ascontiguousarray(frames_THWC[chosen].reshape(-1, width, 3)))
    palette = mosaic.quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=1)
    images = [
        Image.fromarray(np.ascontiguousarray(image_HWC))
        .quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
        .resize((width * scale, height * scale), Image.Resampling.NEAREST)
        for image_HWC in frames_THWC
    ]
    marks_ms = [10 * round(100 * index / fps) for index in range(num_frames + 1)]
    delays_ms = [after - before for before, after in pairwise(marks_ms)]
    rest = images[1:]
    images[0].save(path, format="GIF", save_all=True, append_images=rest, duration=delays_ms, loop=0)


def _checked_frames(frames: Frames) -> NDArray[np.uint8]:
    array = np.asarray(frames)
    if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape or array.dtype != np.uint8:
        raise ValueError(f"frames are {array.dtype} {array.shape}; use uint8 (T, H, W, 3), no dim empty")
    if array.shape[1] * array.shape[2] > MAX_PIXELS:
        raise ValueError(f"{array.shape[2]}x{array.shape[1]} pixels exceed the limit of {MAX_PIXELS}")
    return array


def probe(data: bytes | Path, timeout_s: float = TIMEOUT_S) -> VideoInfo:
    """Read every packet's timestamp and decode one frame.

    Raises ClipError where ``decode_clip`` would whatever it is asked for; damage inside a later frame is what
    only ``verify`` finds.
    """
    with _opened(data, threads=1, timeout_s=timeout_s) as track:
        timeline = track.read_timeline()
        for _, frame in track.frames_from(timeline.keys[0][1]):
            return track.info(frame, timeline)
        raise ClipError(f"no frame decodes, though the file holds {len(timeline.pts)} packets of video")


def verify(data: bytes | Path, timeout_s: float = TIMEOUT_S) -> VideoInfo:
    """Decode every frame once, as a proof that the clip can be used.

    Raises ClipError for all that ``probe`` finds, for frames that do not decode or decode damaged, and for a
    picture size that changes on the way.
    """
    with _opened(data, threads=1, timeout_s=timeout_s, strict=True) as track:
        timeline = track.read_timeline()
        num_decoded, first = 0, None
        for _, frame in track.frames_from(timeline.keys[0][1]):
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
        return track.info(first, timeline)


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
    threads: int = 1,
    timeout_s: float = TIMEOUT_S,
) -> torch.Tensor:
    """Decode a window of a clip as uint8 (num_frames, height, width, 3), RGB; ``first_only`` its first frame.

    Output frame i is the frame on screen i/fps seconds after the window's start; ``fps`` of 0 or None takes
    consecutive frames of the file. The window starts at ``start_fraction`` (0 to 1) of the time that is left
    over, moved back to the start of the frame shown then. The picture is turned upright, made square in its
    pixels, resized until it covers the target and cut at ``crop_fraction`` (vertical, horizontal; 0 to 1) of
    what sticks out. The first video track that is not a cover picture is read.

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
    with _opened(data, threads, timeout_s) as track:
        timeline = track.read_timeline()
        targets = timeline.window(num_frames, fps, start_fraction)[: 1 if first_only else None]
        out = np.empty((len(targets), height, width, 3), np.uint8)
        # A key frame is a promise that some files break (intra refresh): the second try starts at the front.
        for start in dict.fromkeys((timeline.key_before(targets[0]), timeline.keys[0][1])):
            if track.fill(out, targets, track.frames_from(start), crop_fraction):
                return torch.from_numpy(out)
        raise ClipError(f"nothing decodes at {float(targets[0] * timeline.tick_s):.2f} s; the file is damaged")


@contextmanager
def _opened(data: bytes | Path, threads: int, timeout_s: float, strict: bool = False) -> Iterator[_Track]:
    """Open the first moving-picture track; every failure to do so becomes a ClipError."""
    try:
        # A file object, never a name: to FFmpeg a name can be an address or a list of files.
        source = io.BytesIO(data) if isinstance(data, bytes) else Path(data).open("rb")  # noqa: SIM115
    except OSError as error:
        raise ClipError(f"{data!s} cannot be read: {error.strerror}") from error
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "none", "max_pixels": str(MAX_PIXELS)}
    with source:
        try:
            container = av.open(source, "r", options=options, metadata_errors="replace")
        except _FAULTS as error:
            raise _clip_error(f"does not open as one of {FORMATS}", error) from error
        with container:
            stream = _video_stream(container)
            stream.codec_context.thread_count = threads
            if strict:
                # Damage is otherwise painted over from neighbouring frames, in silence.
                stream.codec_context.options = {"err_detect": "explode"}
            yield _Track(container, stream, time.monotonic() + timeout_s, VideoReformatter())


def _clip_error(what: str, error: Exception) -> ClipError:
    """``error`` as a fault of the clip; raises it again if it is a fault of the machine, or a ClipError."""
    if isinstance(error, ClipError):
        raise error
    # A seek to before the file's start, which a damaged header asks for, is the clip's own.
    if isinstance(error, OSError) and not isinstance(error, av.FFmpegError) and error.errno != errno.EINVAL:
        raise error
    return ClipError(f"{what}: {getattr(error, 'strerror', None) or error}")


def _video_stream(container: InputContainer) -> VideoStream:
    streams = [stream for stream in container.streams.video if not stream.disposition & stream.disposition.attached_pic]
    if not streams:
        raise ClipError(f"no video among the {len(container.streams)} tracks")
    context = streams[0].codec_context
    if context is None:
        raise ClipError("no decoder for the video track")
    _check_pixels(context.width, context.height)
    return streams[0]


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ClipError(f"{width}x{height} pixels exceed the limit of {MAX_PIXELS}")


@dataclass(frozen=True, slots=True)
class _Timeline:
    """Instants of all shown frames, in ticks of the track's time base."""

    pts: list[int]
    """When each frame appears, ascending."""
    end: int
    """When the last frame disappears."""
    tick_s: Fraction
    keys: list[tuple[int, int]]
    """(pts, timestamp to seek to) of every frame that decoding can start from, ascending."""

    @property
    def duration_s(self) -> float:
        return float((self.end - self.pts[0]) * self.tick_s)

    def key_before(self, pts: int) -> int:
        """Where to seek to so that decoding reaches the frame at ``pts``."""
        return self.keys[max(0, bisect_right(self.keys, pts, key=lambda key: key[0]) - 1)][1]

    def window(self, num_frames: int, fps: float | None, start_fraction: float) -> list[int]:
        """The pts of the frame to show at each output instant; ClipError if the clip is too short."""
        if not fps:
            spare = len(self.pts) - num_frames
            if spare < 0:
                raise ClipError(f"too short: {len(self.pts)} frames at the file's own rate, {num_frames} are needed")
            start = round(start_fraction * spare)
            return self.pts[start : start + num_frames]
        # Half a frame of grace: rates such as 29.97 for 30, and headers without the last frame's duration.
        num_available = int(self.duration_s * fps + 0.5)
        if num_available < num_frames:
            raise ClipError(
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


@dataclass(frozen=True, slots=True)
class _Track:
    """One open video track and the time by which work on it must be done."""

    container: InputContainer
    stream: VideoStream
    deadline: float
    scaler: VideoReformatter
    """One for all frames: to set it up costs more than to convert a small frame."""

    def check_deadline(self) -> None:
        if time.monotonic() > self.deadline:
            raise ClipError("reading takes longer than timeout_s; the file may be built to waste time")

    def read_timeline(self) -> _Timeline:
        """Read all packets, and decode only where their timestamps do not suffice."""
        packets = list(self._packets())
        if not packets:
            raise ClipError("no frames: the video track is empty")
        shown = [packet for packet in packets if packet.pts is not None]
        # AVI has no presentation times, and VP8 sends pictures that are never shown: decoding tells there.
        if len(shown) < len(packets) or self.stream.codec_context.name == "vp8":
            frames = self.frames_from(packets[0].dts or 0)
            shown = [_Packet(pts, None, frame.duration or 0, False) for pts, frame in frames]
        pts = sorted({packet.pts for packet in shown if packet.pts is not None})
        if not pts or self.stream.time_base is None:
            raise ClipError("no frame says when it is to be shown")
        keys = sorted(packet.seek_point() for packet in shown if packet.is_key)
        last = max((packet.duration for packet in shown if packet.pts == pts[-1]), default=0)
        last = last or (pts[-1] - pts[-2] if len(pts) > 1 else 1)
        timeline = _Timeline(pts, pts[-1] + last, self.stream.time_base, keys or [(pts[0], pts[0])])
        self._check_complete(len(packets), timeline.duration_s)
        return timeline

    def _packets(self) -> Iterator[_Packet]:
        num_packets = 0
        try:
            for packet in self.container.demux(self.stream):
                self.check_deadline()
                if packet.size == 0:
                    continue
                if packet.is_corrupt:
                    raise ClipError(f"truncated or damaged: packet {num_packets} is not whole")
                if num_packets == MAX_FRAMES:
                    raise ClipError(f"more than {MAX_FRAMES} frames; cut the file into clips first")
                num_packets += 1
                if not packet.is_discard:
                    yield _Packet(packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe)
        except _FAULTS as error:
            raise _clip_error(f"truncated or damaged after packet {num_packets}", error) from error

    def _check_complete(self, num_packets: int, duration_s: float) -> None:
        num_listed = len(self.stream.index_entries)
        if num_packets < num_listed:
            raise ClipError(f"truncated: the index lists {num_listed} frames, the file holds {num_packets}")
        if "mp4" in self.container.format.name or num_packets == 1:
            return  # an mp4's index lists every frame, and its duration may leave frames out on purpose
        declared_s = float((self.stream.duration or 0) * (self.stream.time_base or 0))
        if not declared_s and len(self.container.streams) == 1:
            declared_s = (self.container.duration or 0) / av.time_base
        if declared_s - duration_s > max(0.5, 0.05 * declared_s):
            raise ClipError(f"truncated: the header says {declared_s:.2f} s, {duration_s:.2f} s are there")

    def frames_from(self, start: int) -> Iterator[tuple[int, VideoFrame]]:
        """(pts, frame) in the order they are shown, from the key frame at or before ``start`` ticks."""
        num_frames = 0
        try:
            self.container.seek(start, stream=self.stream)
            for frame in self.container.decode(self.stream):
                self.check_deadline()
                _check_pixels(frame.width, frame.height)
                if frame.pts is not None:
                    yield frame.pts, frame
                num_frames += 1
        except _FAULTS as error:
            raise _clip_error(f"damaged: decoding fails after frame {num_frames}", error) from error

    def fill(
        self,
        out_THWC: NDArray[np.uint8],
        targets: list[int],
        frames: Iterator[tuple[int, VideoFrame]],
        crop_fraction: tuple[float, float],
    ) -> bool:
        """Write the frames shown at ``targets``; False where decoding starts after the first of them."""
        filled, shown, pts = 0, None, 0
        for pts, frame in frames:
            # A frame that did not decode leaves the one before it on screen, as in a player.
            for image, until in ((shown, pts - 1), (frame, pts)):
                ready = bisect_right(targets, until, lo=filled)
                if ready == filled:
                    continue
                if image is None:
                    return False
                out_THWC[filled:ready] = self._picture(image, out_THWC.shape[1:3], crop_fraction)
                filled = ready
            if filled == len(targets):
                return True
            shown = frame
        if shown is None:
            return False
        tick_s = float(self.stream.time_base or 0)
        raise ClipError(
            f"truncated or damaged: the last frame that decodes is at {pts * tick_s:.2f} s, "
            f"one at {targets[filled] * tick_s:.2f} s is needed"
        )

    def _picture(
        self, frame: VideoFrame, size: tuple[int, ...], crop_fraction: tuple[float, float]
    ) -> NDArray[np.uint8]:
        """One frame upright, resized to cover ``size`` (height, width) and cut to it: (height, width, 3)."""
        height, width = size
        orientation = _orientation(frame)
        coded_h, coded_w = (width, height) if orientation.transpose else (height, width)
        shown_w = frame.width * self._pixel_aspect()
        scale = max(coded_w / shown_w, coded_h / frame.height)
        cover_w = max(coded_w, round(shown_w * scale))
        cover_h = max(coded_h, round(frame.height * scale))
        _check_pixels(cover_w, cover_h)
        image_HWC = orientation.apply(_to_rgb(self.scaler, frame, cover_h, cover_w))
        top = round(crop_fraction[0] * (image_HWC.shape[0] - height))
        left = round(crop_fraction[1] * (image_HWC.shape[1] - width))
        return image_HWC[top : top + height, left : left + width]

    def _pixel_aspect(self) -> float:
        ratio = self.stream.sample_aspect_ratio
        if not ratio or ratio < 0:
            return 1.0
        if not 1 / MAX_PIXEL_ASPECT <= ratio <= MAX_PIXEL_ASPECT:
            raise ClipError(f"damaged: pixels of {ratio.numerator}:{ratio.denominator} are not believable")
        return float(ratio)

    def info(self, frame: VideoFrame, timeline: _Timeline) -> VideoInfo:
        orientation = _orientation(frame)
        size = max(1, round(frame.width * self._pixel_aspect())), frame.height
        width, height = size[::-1] if orientation.transpose else size
        num_frames = len(timeline.pts)
        fps, header_fps = num_frames / timeline.duration_s, float(self.stream.average_rate or 0)
        # Timestamps are rounded to ticks: the header's exact rate is better where the two agree.
        fps = header_fps if abs(header_fps - fps) < 0.005 * fps else fps
        codec = self.stream.codec_context.name
        return VideoInfo(width, height, fps, num_frames, timeline.duration_s, codec, orientation.rotation)


@dataclass(frozen=True, slots=True)
class _Packet:
    """Times of one packet, in ticks."""

    pts: int | None
    dts: int | None
    duration: int
    is_key: bool

    def seek_point(self) -> tuple[int, int]:
        """(pts, timestamp to seek to): containers index by either time, and too early is only slower."""
        pts = self.pts or 0
        return pts, pts if self.dts is None else min(pts, self.dts)


def _to_rgb(scaler: VideoReformatter, frame: VideoFrame, height: int, width: int) -> NDArray[np.uint8]:
    # Untagged files follow the convention that players use: BT.709 from 720 lines on, BT.601 below.
    is_untagged_hd = frame.colorspace == _AVCOL_UNSPECIFIED and min(frame.width, frame.height) >= 720
    try:
        rgb = scaler.reformat(
            frame,
            width,
            height,
            "rgb24",
            src_colorspace=Colorspace.ITU709 if is_untagged_hd else None,
            interpolation=_SCALER,
            dst_color_range=ColorRange.JPEG,
            threads=1,
        )
    except av.FFmpegError as error:
        raise ClipError(f"pixel format {frame.format.name} cannot be turned into RGB") from error
    return np.asarray(rgb.to_ndarray(), dtype=np.uint8)


def _orientation(frame: VideoFrame) -> _Orientation:
    """Quarter turns and mirrors of the display matrix; other angles count as the nearest quarter turn."""
    matrix = next((bytes(data) for data in _side_data(frame) if data.type.name == "DISPLAYMATRIX"), b"")
    if len(matrix) < 20:
        return _Orientation()
    # A pixel at (x, y), y down, is shown at (a x + c y, b x + d y).
    a, b, _, c, d = struct.unpack_from("=5i", matrix)
    if abs(b) + abs(c) > abs(a) + abs(d):
        return _Orientation(transpose=True, flip_rows=b < 0, flip_cols=c < 0)
    return _Orientation(flip_rows=d < 0, flip_cols=a < 0)


def _side_data(frame: VideoFrame) -> list[SideData]:
    # The stubs call it a mapping; iterating over it gives the values.
    return cast("list[SideData]", list(frame.side_data))
