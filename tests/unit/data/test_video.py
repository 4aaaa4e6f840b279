"""Encode, probe, verify and decode: exact times, right sizes, right way up, and every bad file refused."""

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
from PIL import Image

from vidit.data import video
from vidit.data.video import ClipError, decode_clip, encode_mp4, probe, verify, write_gif

CLIPS = Path(os.environ.get("VIDIT_TEST_CLIPS") or Path(__file__).parents[3] / "../shared/clips")
needs_clips = pytest.mark.skipif(not CLIPS.is_dir(), reason=f"no test clips at {CLIPS}; set VIDIT_TEST_CLIPS")


def picture(height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """A picture without any symmetry: red grows to the right, green downwards, one blue corner."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([255 * x / (width - 1), 255 * y / (height - 1), 0 * x], axis=-1).round().astype(np.uint8)
    image[: height // 4, : width // 4, 2] = 255
    return image


def moving(num_frames: int = 9, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    return np.stack([np.roll(picture(height, width), 2 * index, axis=1) for index in range(num_frames)])


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


class TestEncode:
    def test_round_trip(self) -> None:
        frames = moving()
        data = encode_mp4(frames, fps=8)
        clip = decode_clip(data, num_frames=9, fps=8, height=48, width=64)
        assert clip.dtype == torch.uint8
        assert clip.shape == (9, 48, 64, 3)
        assert np.abs(clip.numpy().astype(int) - frames).mean() < 3

    @pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (200, 40, 90), (10, 200, 30)])
    def test_colours_survive(self, colour: tuple[int, int, int]) -> None:
        frames = np.broadcast_to(np.array(colour, np.uint8), (4, 32, 32, 3))
        clip = decode_clip(encode_mp4(frames, 8), num_frames=4, fps=0, height=32, width=32)
        assert np.abs(clip.numpy().astype(int) - np.array(colour)).max() <= 3

    def test_same_bytes_twice_and_index_in_front(self) -> None:
        data = encode_mp4(moving(), fps=8)
        assert data == encode_mp4(torch.from_numpy(moving()), fps=8)
        assert 0 < data.index(b"moov") < data.index(b"mdat")

    def test_a_long_clip_fits_the_room_kept_for_the_index(self) -> None:
        frames = np.random.default_rng(0).integers(0, 256, (300, 16, 16, 3), dtype=np.uint8)
        assert probe(encode_mp4(frames, fps=29.97)).num_frames == 300

    def test_odd_sizes_gain_a_row_and_a_column(self) -> None:
        info = probe(encode_mp4(moving(height=31, width=33), fps=8))
        assert (info.width, info.height) == (34, 32)

    def test_rates_that_are_no_whole_number(self) -> None:
        assert probe(encode_mp4(moving(), fps=30000 / 1001)).fps == pytest.approx(30000 / 1001)

    @pytest.mark.parametrize(
        "frames",
        [
            np.zeros((3, 8, 8), np.uint8),
            np.zeros((0, 8, 8, 3), np.uint8),
            np.zeros((3, 8, 8, 3), np.float32),
            np.zeros((3, 8, 8, 4), np.uint8),
        ],
    )
    def test_wrong_arrays(self, frames: NDArray[np.uint8], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="use uint8"):
            encode_mp4(frames, 8)
        with pytest.raises(ValueError, match="use uint8"):
            write_gif(tmp_path / "a.gif", frames, 8)

    def test_wrong_numbers(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="fps=0"):
            encode_mp4(moving(), 0)
        with pytest.raises(ValueError, match="crf=60"):
            encode_mp4(moving(), 8, crf=60)
        with pytest.raises(ValueError, match="scale=0"):
            write_gif(tmp_path / "a.gif", moving(), 8, scale=0)
        with pytest.raises(ValueError, match="fps=60"):
            write_gif(tmp_path / "a.gif", moving(), 60)


def test_gif_has_the_frames_the_mean_rate_and_the_size(tmp_path: Path) -> None:
    path, frames = tmp_path / "clip.gif", moving(16)
    write_gif(path, frames, fps=16, scale=2)
    delays, worst = [], 0.0
    with Image.open(path) as image:
        assert image.size == (128, 96)
        assert getattr(image, "n_frames", 1) == 16
        for index in range(16):
            image.seek(index)
            delays.append(image.info["duration"])
            found = np.asarray(image.convert("RGB"))[::2, ::2].astype(int)
            worst = max(worst, float(np.abs(found - frames[index]).mean()))
    assert sum(delays) == 1000
    assert worst < 12


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
        data = encode_mp4(moving(17), fps=24)
        assert small(data, num_frames=17, fps=23.976).shape[0] == 17

    def test_one_frame(self) -> None:
        data = grey_file([0])
        assert shown(small(data, num_frames=1, fps=25)) == [0]


class TestPicture:
    def test_crop_fractions_choose_the_side(self) -> None:
        data = encode_mp4(np.repeat(picture(32, 96)[None], 4, axis=0), fps=8, crf=5)
        full = decode_clip(data, num_frames=1, fps=0, height=32, width=96)[0].int()
        for fraction, left in ((0.0, 0), (0.5, 32), (1.0, 64)):
            part = decode_clip(data, num_frames=1, fps=0, height=32, width=32, crop_fraction=(0.5, fraction))[0].int()
            assert (part - full[:, left : left + 32]).abs().max() <= 1

    @pytest.mark.parametrize("size", [(16, 16), (48, 64), (33, 47), (96, 40), (100, 300)])
    def test_resize_agrees_with_pillow(self, size: tuple[int, int]) -> None:
        height, width = size
        source = moving(4, 120, 160)
        data = encode_mp4(source, fps=8, crf=4)
        clip = decode_clip(data, num_frames=4, fps=0, height=height, width=width)
        scale = max(height / 120, width / 160)
        cover = (max(width, round(160 * scale)), max(height, round(120 * scale)))
        image = np.asarray(Image.fromarray(source[0]).resize(cover, Image.Resampling.BICUBIC)).astype(int)
        top, left = round((cover[1] - height) / 2), round((cover[0] - width) / 2)
        difference = np.abs(clip[0].numpy() - image[top : top + height, left : left + width])
        assert difference.mean() < 4

    def test_shrinking_is_antialiased(self) -> None:
        stripes = np.zeros((4, 256, 256, 3), np.uint8)
        stripes[:, :, ::2] = 255
        clip = decode_clip(encode_mp4(stripes, 8, crf=2), num_frames=1, fps=0, height=60, width=60)
        assert clip[0, 5:-5, 5:-5].float().std() < 6

    @pytest.mark.parametrize("rotation", [0, 90, 180, 270])
    @pytest.mark.parametrize("mirror", [False, True])
    def test_all_display_matrices(self, rotation: int, mirror: bool) -> None:
        upright = picture(32, 64)
        data = turned_file(upright, rotation, mirror)
        # av_display_matrix_flip mirrors what is shown, so after the turn, which is counter-clockwise.
        expected = np.rot90(upright, rotation // 90)[:, :: -1 if mirror else 1]
        height, width = expected.shape[:2]
        info = probe(data)
        assert (info.width, info.height) == (width, height)
        clip = decode_clip(data, num_frames=2, fps=0, height=height, width=width)
        assert np.abs(clip[0].numpy().astype(int) - expected).mean() < 3

    def test_pixels_that_are_not_square(self) -> None:
        data = grey_file([0, 40, 80, 120], sample_aspect_ratio=Fraction(3, 2))
        assert (probe(data).width, probe(data).height) == (48, 32)

    def test_pixels_that_nobody_would_believe(self) -> None:
        data = grey_file([0, 40, 80, 120], sample_aspect_ratio=Fraction(20, 1))
        with pytest.raises(ClipError, match="20:1"):
            probe(data)

    def test_threads_change_nothing(self) -> None:
        data = encode_mp4(moving(20), fps=8)
        assert torch.equal(small(data, num_frames=9, threads=1), small(data, num_frames=9, threads=3))

    def test_paths_and_bytes_agree(self, tmp_path: Path) -> None:
        # A name that FFmpeg would take for an address.
        path = tmp_path / "concat:a|b.mp4"
        path.write_bytes(encode_mp4(moving(), fps=8))
        assert torch.equal(small(path), small(path.read_bytes()))
        assert probe(path) == probe(path.read_bytes())


def turned_file(image: NDArray[np.uint8], rotation: int, mirror: bool) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "4"})
        stream.height, stream.width = image.shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.set_display_rotation(rotation, hflip=mirror)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


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
        data = encode_mp4(moving(), fps=8)
        with monkeypatch.context() as patch:
            patch.setattr(video, "MAX_PIXELS", 1000)
            with pytest.raises(ClipError, match=r"exceed the limit of 1000|does not open"):
                small(data)
        monkeypatch.setattr(video, "MAX_FRAMES", 8)
        with pytest.raises(ClipError, match="more than 8 frames"):
            small(data)
        with pytest.raises(ClipError, match="timeout_s"):
            small(data, timeout_s=-1.0)

    def test_too_elongated(self) -> None:
        data = encode_mp4(np.zeros((2, 16, 4096, 3), np.uint8), fps=8)
        with pytest.raises(ClipError, match="exceed the limit"):
            decode_clip(data, num_frames=1, fps=0, height=1024, width=16)

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
            small(encode_mp4(moving(), 8), **request_)
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


def test_random_access_equals_decoding_all() -> None:
    rng = np.random.default_rng(3)
    data = encode_mp4(rng.integers(0, 256, (100, 16, 16, 3), dtype=np.uint8), fps=10)
    everything = small(data, num_frames=100)
    for start_fraction in (0.1, 0.33, 0.66, 0.9, 1.0):
        begin = round(start_fraction * 95)
        part = small(data, num_frames=5, start_fraction=start_fraction)
        assert torch.equal(part, everything[begin : begin + 5])


def test_a_key_frame_that_is_none_starts_from_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    data = grey_file([40 * index for index in range(24)])
    monkeypatch.setattr(video._Timeline, "key_before", lambda self, pts: self.keys[-1][1])
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
