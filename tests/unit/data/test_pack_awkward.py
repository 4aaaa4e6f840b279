"""Files that break naive readers: what packing makes of each is what a player shows, or a reason."""

from __future__ import annotations

import io
import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pytest
from av.video.stream import VideoStream

from vidit.data.pack import pack
from vidit.data.shards import read_clip, read_index

CLIPS = Path(os.environ.get("VIDIT_TEST_CLIPS") or Path(__file__).parents[3] / "../shared/clips")
needs_clips = pytest.mark.skipif(not CLIPS.is_dir(), reason=f"no test clips at {CLIPS}; set VIDIT_TEST_CLIPS")

# Width, height, frames, mean rate as a player shows them; or the reason against the file.
VERDICTS: dict[str, tuple[int, int, int, float] | str] = {
    "made_rotate90.mp4": (360, 480, 90, 29.98),
    "made_vfr.mp4": (320, 180, 69, 13.43),
    "orig_1fps_106x60_bframes.MP4": (106, 60, 31, 1.0),
    "orig_mjpeg_fragmented.mov": (196, 144, 1422, 29.97),  # 176x144 with pixels of 135:121
    "orig_msmpeg4_1fps_90x60.asf": (90, 60, 61, 1.0),
    "orig_six_streams_two_video.mp4": (320, 180, 325, 25.0),
    "orig_vfr_rotate180_audio.mp4": (1280, 720, 25, 10.51),
    "made_truncated_half.mp4": "the index lists 185 frames, the file holds 90",
    "made_truncated_no_moov.mp4": "does not open",
    "made_zero_bytes.mp4": "does not open",
    "made_zero_frames.mp4": "the video track is empty",
}


def verdicts(folder: Path, out: Path) -> dict[str, tuple[int, int, int, float] | str]:
    """File -> what its sidecar and its line of the index say, which must agree, or why it was left out."""
    report = pack(folder, out, allow_empty_captions=True)
    found: dict[str, tuple[int, int, int, float] | str] = dict(report.rejected)
    for ref in read_index(out):
        video, _, sidecar = read_clip(ref)
        assert video == (folder / sidecar["file"]).read_bytes()
        facts = (ref.width, ref.height, ref.num_frames, ref.fps)
        assert facts == tuple(sidecar[name] for name in ("width", "height", "num_frames", "fps"))
        found[sidecar["file"]] = facts
    return found


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, verdict in expected.items():
        if isinstance(verdict, str):
            assert verdict in found[name], name
        else:
            assert found[name][:3] == verdict[:3], name
            assert found[name][3] == pytest.approx(verdict[3], abs=0.01), name


@needs_clips
def test_every_file_of_the_collection(tmp_path: Path) -> None:
    check(verdicts(CLIPS / "awkward", tmp_path / "out"), VERDICTS)


@needs_clips
def test_every_real_clip_is_kept(tmp_path: Path) -> None:
    report = pack(CLIPS / "real", tmp_path / "out")
    rows = [json.loads(line) for line in (CLIPS / "real" / "clips.jsonl").read_text().splitlines()]
    assert (len(report.kept), report.rejected, report.duplicates) == (24, (), ())
    assert {ref.video_sha256 for ref in read_index(tmp_path / "out")} == {row["sha256"] for row in rows}


def video_file(
    container_format: str = "mp4",
    codec: str = "libx264",
    size: tuple[int, int] = (48, 32),
    times: tuple[int, ...] = (0, 40, 80, 120, 160),
    pixel_aspect: Fraction | None = None,
    rotation: int = 0,
    num_tracks: int = 1,
    pix_fmt: str = "yuv420p",
) -> bytes:
    """Grey frames at ``times`` in ms, on one track or several that look the same."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container_format) as container:
        streams = [cast("VideoStream", container.add_stream(codec, rate=25)) for _ in range(num_tracks)]
        for stream in streams:
            context = stream.codec_context
            (context.width, context.height), context.pix_fmt = size, pix_fmt
            # MPEG-4 and its relatives count in frames.
            context.time_base = Fraction(1, 1000) if codec == "libx264" else Fraction(1, 25)
            if pixel_aspect:
                stream.sample_aspect_ratio = pixel_aspect
            if rotation:
                stream.set_display_rotation(rotation)
        for stream in streams:
            for level, when in enumerate(times):
                image = np.full((size[1], size[0], 3), 20 * level, np.uint8)
                frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format=pix_fmt)
                frame.pts = when if codec == "libx264" else when // 40
                frame.time_base = stream.codec_context.time_base
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return buffer.getvalue()


def test_files_made_awkward(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    whole = video_file()
    files = {
        "turned.mp4": video_file(rotation=90),
        "upside_down.mov": video_file("mov", rotation=180),
        "variable.mp4": video_file(times=(0, 33, 67, 100, 600, 1100)),
        "wide_pixels.mp4": video_file(pixel_aspect=Fraction(4, 3)),
        "odd.mkv": video_file("matroska", size=(37, 35), pix_fmt="yuv444p"),
        "two_tracks.mp4": video_file(num_tracks=2),
        "old.avi": video_file("avi", "mpeg4"),
        "older.asf": video_file("asf", "msmpeg4"),
        "photos.mov": video_file("mov", "mjpeg", pix_fmt="yuvj420p"),
        "cut.mp4": whole[: len(whole) // 2],
        "empty.mp4": b"",
        "text.mp4": b"#EXTM3U\nhttps://example.com/other.mp4\n",
    }
    for name, content in files.items():
        (source / name).write_bytes(content)
    expected = {
        "turned.mp4": (32, 48, 5, 25.0),
        "upside_down.mov": (48, 32, 5, 25.0),
        "variable.mp4": (48, 32, 6, 6 / 1.14),  # the last frame stays for the 40 ms that the file says
        "wide_pixels.mp4": (64, 32, 5, 25.0),
        "odd.mkv": (37, 35, 5, 25.0),
        "two_tracks.mp4": (48, 32, 5, 25.0),
        "old.avi": (48, 32, 5, 25.0),
        "older.asf": (48, 32, 5, 25.0),
        "photos.mov": (48, 32, 5, 25.0),
        "cut.mp4": "does not open",
        "empty.mp4": "does not open",
        "text.mp4": "does not open",
    }
    check(verdicts(source, tmp_path / "out"), expected)
