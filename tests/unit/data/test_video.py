"""Probe, verify and decode: exact times, no frame decoded in vain, and every bad file refused."""

from __future__ import annotations

import io
import os
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
import pytest
import torch
from av.container import InputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray

from vidit.data import limits, timeline, track
from vidit.data.encode import encode_mp4
from vidit.data.limits import ClipError
from vidit.data.video import decode_clip, probe, verify

CLIPS = Path(os.environ.get("VIDIT_TEST_CLIPS") or Path(__file__).parents[3] / "../shared/clips")
needs_clips = pytest.mark.skipif(not CLIPS.is_dir(), reason=f"no test clips at {CLIPS}; set VIDIT_TEST_CLIPS")


def black(num_frames: int = 9, fps: float = 8) -> bytes:
    return encode_mp4(np.zeros((num_frames, 48, 64, 3), np.uint8), fps)


def grey_file(
    pts: list[int],
    time_base: Fraction = Fraction(1, 1000),
    container_format: str = "mp4",
    codec: str = "libx264",
    bframes: int = 2,
    level_of: float = 10.0,
    **track: object,
) -> bytes:
    """Frames whose brightness is their index (times ``level_of``), shown at ``pts``."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container_format) as container:
        stream = cast("VideoStream", container.add_stream(codec, rate=25))
        context = stream.codec_context
        context.width, context.height, context.pix_fmt = 32, 32, "yuv420p"
        context.time_base = time_base
        context.gop_size = 8
        context.bit_rate = 4_000_000
        if codec != "libvpx":
            context.max_b_frames = bframes
        for name, value in track.items():
            setattr(stream, name, value)
        for index, when in enumerate(pts):
            level = np.full((32, 32, 3), round(20 + index * level_of), np.uint8)
            frame = av.VideoFrame.from_ndarray(level, "rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = when, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def shown(clip: torch.Tensor, level_of: float = 10.0) -> list[int]:
    levels = clip.float().mean(dim=(1, 2, 3))
    return ((levels - 20) / level_of).round().int().tolist()


def small(data: bytes | Path, **request: object) -> torch.Tensor:
    return decode_clip(data, **{"num_frames": 4, "fps": 0, "height": 16, "width": 16, **request})  # type: ignore


class TestTime:
    PTS = (0, 33, 67, 100, 133, 233, 333, 433, 533, 766, 1000, 1233)

    @pytest.mark.parametrize("bframes", [0, 2])
    @pytest.mark.parametrize("fps", [5.0, 8.0, 12.0, 24.0])
    def test_variable_rate(self, fps: float, bframes: int) -> None:
        data = grey_file(list(self.PTS), bframes=bframes)
        num_frames = 5
        clip = small(data, num_frames=num_frames, fps=fps, start_fraction=0.0)
        expected = [max(i for i, t in enumerate(self.PTS) if t <= 1000 * k / fps + 1.001) for k in range(num_frames)]
        assert shown(clip) == expected

    @pytest.mark.parametrize("start_fraction", [0.0, 0.3, 0.5, 0.77, 1.0])
    def test_the_window_lies_where_it_was_asked(self, start_fraction: float) -> None:
        data = grey_file([40 * index for index in range(24)], bframes=2)
        first = shown(small(data, num_frames=4, fps=25, start_fraction=start_fraction))
        begin = int(start_fraction * 20 + 1e-6)
        assert first == list(range(begin, begin + 4))

    def test_native_rate_takes_consecutive_frames(self) -> None:
        data = grey_file(list(self.PTS))
        assert shown(small(data, num_frames=4, fps=None, start_fraction=0.5)) == [4, 5, 6, 7]
        assert shown(small(data, num_frames=12, fps=0)) == list(range(12))

    def test_slow_sources_repeat_and_fast_ones_skip(self) -> None:
        data = grey_file([1000 * index for index in range(3)])
        assert shown(small(data, num_frames=4, fps=2)) == [0, 0, 1, 1]
        data = grey_file([20 * index for index in range(20)])
        assert shown(small(data, num_frames=4, fps=10)) == [0, 5, 10, 15]

    def test_a_timeline_that_does_not_start_at_zero(self) -> None:
        data = grey_file([500 + 40 * index for index in range(12)], container_format="matroska")
        assert shown(small(data, num_frames=12, fps=25)) == list(range(12))

    @pytest.mark.parametrize(
        ("container_format", "codec"),
        [("matroska", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4"), ("asf", "mpeg4"), ("mov", "mpeg4")],
    )
    @pytest.mark.parametrize("start_fraction", [0.0, 1.0])
    def test_other_containers(self, container_format: str, codec: str, start_fraction: float) -> None:
        base = Fraction(1, 25)
        data = grey_file(list(range(20)), base, container_format=container_format, codec=codec, bframes=0)
        assert verify(data).num_frames == 20
        begin = 0 if start_fraction == 0 else 15
        for fps in (25.0, 0.0):
            clip = small(data, num_frames=5, fps=fps, start_fraction=start_fraction)
            assert shown(clip) == list(range(begin, begin + 5))

    def test_avi_with_b_frames_has_no_presentation_times(self) -> None:
        data = grey_file(list(range(20)), Fraction(1, 25), container_format="avi", codec="mpeg4", bframes=2)
        frames = shown(small(data, num_frames=10, fps=0, start_fraction=0.0))
        assert frames == list(range(10))

    def test_too_short_names_both_numbers(self) -> None:
        data = grey_file([40 * index for index in range(10)])
        with pytest.raises(ClipError, match=r"too short: 10 frames .* 11 are needed"):
            small(data, num_frames=11)
        with pytest.raises(ClipError, match=r"0.400 s give 5 frames at 12 fps, 9 are needed"):
            small(data, num_frames=9, fps=12)

    def test_half_a_frame_of_grace(self) -> None:
        data = black(17, fps=24)
        assert small(data, num_frames=17, fps=23.976).shape[0] == 17

    def test_one_frame(self) -> None:
        data = grey_file([0])
        assert shown(small(data, num_frames=1, fps=25)) == [0]


class TestPixelAspect:
    def test_pixels_that_are_not_square(self) -> None:
        data = grey_file([0, 40, 80, 120], sample_aspect_ratio=Fraction(3, 2))
        assert (probe(data).width, probe(data).height) == (48, 32)

    def test_pixels_that_nobody_would_believe(self) -> None:
        data = grey_file([0, 40, 80, 120], sample_aspect_ratio=Fraction(20, 1))
        with pytest.raises(ClipError, match="20:1"):
            probe(data)


def test_paths_and_bytes_agree(tmp_path: Path) -> None:
    # A name that FFmpeg would take for an address.
    path = tmp_path / "concat:a|b.mp4"
    path.write_bytes(black())
    assert torch.equal(small(path), small(path.read_bytes()))
    assert probe(path) == probe(path.read_bytes())


class TestRefused:
    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"not a video at all" * 50,
            b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
            b"ffconcat version 1.0\nfile /etc/passwd\n",
            b"\x89PNG\r\n\x1a\n" + bytes(100),
        ],
    )
    def test_what_is_no_clip(self, data: bytes) -> None:
        for reader in (probe, verify, small):
            with pytest.raises(ClipError, match="does not open"):
                reader(data)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ClipError, match=r"gone\.mp4 cannot be read: No such file"):
            probe(tmp_path / "gone.mp4")

    def test_sound_only(self) -> None:
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4") as container:
            stream = container.add_stream("aac", rate=16000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        with pytest.raises(ClipError, match="no video among the 1 tracks"):
            probe(buffer.getvalue())

    @pytest.mark.parametrize("container_format", ["mp4", "matroska", "avi"])
    def test_truncated(self, container_format: str) -> None:
        frames = np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), dtype=np.uint8)
        data = encode_mp4(frames, fps=10)
        if container_format == "matroska":
            data = remuxed(data, container_format)
        elif container_format == "avi":
            data = grey_file(list(range(60)), Fraction(1, 25), "avi", "mpeg4", bframes=0, level_of=3.0)
        for reader in (probe, verify, small):
            with pytest.raises(ClipError, match=r"truncated|damaged"):
                reader(data[: len(data) // 2])

    def test_damage_inside(self) -> None:
        frames = np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3), dtype=np.uint8)
        data = bytearray(encode_mp4(frames, fps=10))
        middle = len(data) // 2
        data[middle : middle + 6000] = np.random.default_rng(1).bytes(6000)
        with pytest.raises(ClipError, match=r"damaged|decode"):
            verify(bytes(data))

    def test_limits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = black()
        with monkeypatch.context() as patch:
            patch.setattr(limits, "MAX_PIXELS", 1000)
            with pytest.raises(ClipError, match=r"exceed the limit of 1000|does not open"):
                small(data)
        monkeypatch.setattr(track, "MAX_FRAMES", 8)
        with pytest.raises(ClipError, match="more than 8 frames"):
            small(data)
        with pytest.raises(ClipError, match="timeout_s"):
            small(data, timeout_s=-1.0)

    @pytest.mark.parametrize(
        "request_",
        [
            {"num_frames": 0},
            {"height": 0},
            {"width": 100_000, "height": 100_000},
            {"fps": -1.0},
            {"start_fraction": 1.5},
            {"crop_fraction": (0.0, -0.1)},
            {"start_fraction": float("nan")},
        ],
    )
    def test_wrong_requests(self, request_: dict[str, object]) -> None:
        with pytest.raises(ValueError, match=r"asked for|fps|fraction") as caught:
            small(black(), **request_)
        assert not isinstance(caught.value, ClipError)


def remuxed(data: bytes, container_format: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format=container_format) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in cast("InputContainer", source).demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    return buffer.getvalue()


def noise_file(num_frames: int, bframes: int, container_format: str = "mp4", codec: str = "libx264") -> bytes:
    """Frames that have nothing in common; one in 24 is a key frame, B-frames refer to B-frames."""
    rng, buffer = np.random.default_rng(3), io.BytesIO()
    with av.open(buffer, "w", format=container_format) as container:
        # x264 would see a cut in each frame, and no use for B-frames.
        options = {"x264-params": "scenecut=0:b-adapt=0:b-pyramid=normal"} if codec == "libx264" else {}
        stream = cast("VideoStream", container.add_stream(codec, rate=25, options=options))
        context = stream.codec_context
        context.width, context.height, context.pix_fmt = 32, 32, "yuv420p"
        context.gop_size, context.max_b_frames = 24, bframes
        for _ in range(num_frames):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


class TestDecodeNoMoreThanNeeded:
    @pytest.mark.parametrize(
        ("bframes", "container_format", "codec"),
        [
            (0, "mp4", "libx264"), (2, "mp4", "libx264"), (5, "matroska", "libx264"), (3, "avi", "libx264"),
            (2, "mp4", "mpeg4"), (0, "webm", "libvpx"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("stride", [1, 3])
    def test_pixels_are_those_of_decoding_everything(
        self, bframes: int, container_format: str, codec: str, stride: int
    ) -> None:
        data = noise_file(100, bframes, container_format, codec)
        everything = small(data, num_frames=100, fps=0, start_fraction=0.0)
        for start_fraction in (0.0, 0.1, 0.33, 0.66, 0.9, 1.0):
            window = small(data, num_frames=5, fps=25 / stride, start_fraction=start_fraction)
            begin = int(start_fraction * (100 - 5 * stride) + 1e-6)
            assert torch.equal(window, everything[begin : begin + 5 * stride : stride])

    def test_frames_on_which_nothing_builds_are_passed_over(self) -> None:
        with track.opened(noise_file(100, 3), 60.0) as opened:
            times = opened.read_timeline()
            plain = {when: bytes(frame.planes[0]) for when, frame in opened.frames_from(times.front)}
            wanted = frozenset(times.pts[index] for index in (27, 30, 33))
            start, _ = times.key_before(times.pts[27])
            found = {when: bytes(frame.planes[0]) for when, frame in opened.frames_from(start, wanted)}
            assert sorted(plain) == times.pts
            assert all(plain[when] == image for when, image in found.items())
            # 24 is the key frame; of each three frames between P-frames, the middle one is built upon.
            assert [times.pts.index(when) for when in found] == [24, 26, 27, 28, 30, 32, 33, 34, 36]


def test_a_key_frame_that_is_none_starts_from_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    data = grey_file([40 * index for index in range(24)])
    monkeypatch.setattr(timeline.Timeline, "key_before", lambda self, pts: self.keys[-1])
    assert shown(small(data, num_frames=4, fps=25, start_fraction=0.2)) == [4, 5, 6, 7]


@needs_clips
class TestAwkward:
    @pytest.mark.parametrize(
        ("name", "size", "num_frames", "rotation"),
        [
            ("made_rotate90.mp4", (360, 480), 90, 90),
            ("made_vfr.mp4", (320, 180), 69, 0),
            ("orig_1fps_106x60_bframes.MP4", (106, 60), 31, 0),
            ("orig_mjpeg_fragmented.mov", (196, 144), 1422, 0),
            ("orig_msmpeg4_1fps_90x60.asf", (90, 60), 61, 0),
            ("orig_six_streams_two_video.mp4", (320, 180), 325, 0),
            ("orig_vfr_rotate180_audio.mp4", (1280, 720), 25, 180),
        ],
    )
    def test_readable(self, name: str, size: tuple[int, int], num_frames: int, rotation: int) -> None:
        path = CLIPS / "awkward" / name
        info = verify(path)
        assert ((info.width, info.height), info.num_frames, info.rotation) == (size, num_frames, rotation)
        clip = decode_clip(path, num_frames=9, fps=None, height=size[1], width=size[0], start_fraction=0.0)
        for index in (0, 8):
            expected = reference_frame(path, index, size)
            assert np.abs(clip[index].numpy().astype(int) - expected).mean() < 4

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("made_truncated_half.mp4", "truncated: the index lists 185 frames, the file holds 90"),
            ("made_truncated_no_moov.mp4", "does not open"),
            ("made_zero_frames.mp4", "no frames"),
            ("made_zero_bytes.mp4", "does not open"),
        ],
    )
    def test_refused(self, name: str, reason: str) -> None:
        for reader in (probe, verify, small):
            with pytest.raises(ClipError, match=reason):
                reader(CLIPS / "awkward" / name)

    def test_variable_rate_of_a_real_file(self) -> None:
        path = CLIPS / "awkward" / "made_vfr.mp4"
        with av.open(str(path)) as container:
            frames = [(float(frame.time), frame.to_ndarray(format="gray")) for frame in container.decode(video=0)]
        clip = decode_clip(path, num_frames=16, fps=4, height=180, width=320, start_fraction=0.0)
        grey = clip.numpy().astype(float) @ np.array([0.299, 0.587, 0.114])
        for index in range(16):
            seen = max(i for i, (when, _) in enumerate(frames) if when <= index / 4 + 1e-4)
            errors = [float(np.abs(grey[index] - (image.astype(float) - 16) * 255 / 219).mean()) for _, image in frames]
            assert errors[seen] <= min(errors) + 1e-6 or errors[seen] < 2


def reference_frame(path: Path, index: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """What FFmpeg's own filters show, by another way: decode in order, then transpose or flip, then scale."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = container.decode(stream)
        frame = next(frame for number, frame in enumerate(frames) if number == index)
        graph = av.filter.Graph()
        chain = [graph.add_buffer(template=stream)]
        names = {90: [("transpose", "cclock")], 180: [("hflip", ""), ("vflip", "")]}
        for name, argument in names.get(abs(frame.rotation), []):
            chain.append(graph.add(name, argument) if argument else graph.add(name))
        chain += [
            graph.add("scale", f"{size[0]}:{size[1]}:flags=lanczos+accurate_rnd"),
            graph.add("format", "rgb24"),
        ]
        graph.link_nodes(*chain, graph.add("buffersink")).configure()
        graph.push(frame)
        graph.push(None)
        return cast("av.VideoFrame", graph.pull()).to_ndarray(format="rgb24").astype(int)
