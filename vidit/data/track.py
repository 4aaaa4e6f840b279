"""One video track of a file that nobody vouches for: opened safely, read as timestamps, decoded frame by frame.

Only four container formats are opened, no other file or address can be reached through one (playlists,
references), sizes, frame counts and running time are bounded, and one decoded frame is held at a time. Decoding
uses one thread: a loader's parallelism is its worker processes, and threads of theirs would fight for the cores.
"""

from __future__ import annotations

import errno
import io
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vidit.data.limits import MAX_PIXELS, ClipError, check_pixels
from vidit.data.picture import believable_aspect
from vidit.data.timeline import PacketTimes, Timeline

MAX_FRAMES = 200_000
"""Longest file that is read, about two hours: what trains is cut into clips first."""
FORMATS = "mov,matroska,avi,asf"
_FAULTS = (av.FFmpegError, OSError, ValueError)


@contextmanager
def opened(data: bytes | Path, timeout_s: float, strict: bool = False) -> Iterator[Track]:
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
            stream.codec_context.thread_count = 1
            if strict:
                # Damage is otherwise painted over from neighbouring frames, in silence.
                stream.codec_context.options = {"err_detect": "explode"}
            yield Track(container, stream, time.monotonic() + timeout_s)


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
    check_pixels(context.width, context.height)
    return streams[0]


@dataclass(frozen=True, slots=True)
class Track:
    """One open video track and the time by which work on it must be done."""

    container: InputContainer
    stream: VideoStream
    deadline: float

    def check_deadline(self) -> None:
        if time.monotonic() > self.deadline:
            raise ClipError("reading takes longer than timeout_s; the file may be built to waste time")

    def read_timeline(self) -> Timeline:
        """Read all packets, and decode only where their timestamps do not suffice."""
        packets = list(self._packets())
        if not packets:
            raise ClipError("no frames: the video track is empty")
        shown = [packet for packet in packets if packet.pts is not None]
        # AVI has no presentation times, and VP8 sends pictures that are never shown: decoding tells there.
        if len(shown) < len(packets) or self.stream.codec_context.name == "vp8":
            frames = self.frames_from(packets[0].dts or 0)
            shown = [PacketTimes(pts, None, frame.duration or 0, False) for pts, frame in frames]
        pts = sorted({packet.pts for packet in shown if packet.pts is not None})
        if not pts or self.stream.time_base is None:
            raise ClipError("no frame says when it is to be shown")
        keys = sorted(packet.seek_point() for packet in shown if packet.is_key)
        last = max((packet.duration for packet in shown if packet.pts == pts[-1]), default=0)
        last = last or (pts[-1] - pts[-2] if len(pts) > 1 else 1)
        timeline = Timeline(pts, pts[-1] + last, self.stream.time_base, keys or [(pts[0], pts[0])])
        self._check_complete(len(packets), timeline.duration_s)
        return timeline

    def _packets(self) -> Iterator[PacketTimes]:
        num_packets = 0
        try:
            for packet in self._demuxed():
                self.check_deadline()
                if packet.size == 0:
                    continue
                if packet.is_corrupt:
                    raise ClipError(f"truncated or damaged: packet {num_packets} is not whole")
                if num_packets == MAX_FRAMES:
                    raise ClipError(f"more than {MAX_FRAMES} frames; cut the file into clips first")
                num_packets += 1
                if not packet.is_discard:
                    yield PacketTimes(packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe)
        except _FAULTS as error:
            raise _clip_error(f"truncated or damaged after packet {num_packets}", error) from error

    def _demuxed(self) -> Iterator[Packet[VideoStream]]:
        """The track's packets, from where the file stands.

        PyAV frees a packet when its iterator is closed, not when it is dropped: 150 bytes of every clip that is not
        read to its end. ``yield from`` closes it.
        """
        yield from self.container.demux(self.stream)

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

    def frames_from(self, start: int, wanted: Set[int] = frozenset()) -> Iterator[tuple[int, VideoFrame]]:
        """(pts, frame) in the order they are shown, from the key frame at or before ``start`` ticks.

        With ``wanted``, the pts of some frames, others may be left out: H.264 says of each frame whether another
        builds on it, so the decoder passes over one that nobody asked for, and it is told to give out what it
        holds as soon as the last wanted frame went in. What comes is the same in every bit; nothing comes where
        the seek lands on no key frame.
        """
        context, num_frames = self.stream.codec_context, 0
        missing: set[int | None] = set(wanted)
        # Other codecs have no such flag, or mean less by it: HEVC's holds within one temporal layer.
        can_skip = bool(wanted) and context.name == "h264"
        try:
            self.container.seek(start, stream=self.stream)
            for number, packet in enumerate(self._demuxed()):
                self.check_deadline()
                if wanted and number == 0 and not packet.is_keyframe:
                    return
                is_spare = packet.pts is not None and packet.pts not in wanted
                context.skip_frame = "NONREF" if can_skip and is_spare else "DEFAULT"
                missing.discard(packet.pts)
                is_last = bool(wanted) and not missing
                frames = self.stream.decode(packet)
                if is_last and packet.size:
                    frames += self.stream.decode(None)
                for frame in frames:
                    check_pixels(frame.width, frame.height)
                    if frame.pts is not None:
                        yield frame.pts, frame
                    num_frames += 1
                if is_last:
                    return
        except _FAULTS as error:
            raise _clip_error(f"damaged: decoding fails after frame {num_frames}", error) from error

    def pixel_aspect(self) -> float:
        return believable_aspect(self.stream.sample_aspect_ratio)
