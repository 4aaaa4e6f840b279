"""Scores of clips whose truth is known: speed, shake, cuts, bars, light."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from vidit.data.curation.cuts import CutFinder
from vidit.data.curation.frames import streamed
from vidit.data.curation.motion import MotionMeter
from vidit.data.curation.rows import Row
from vidit.data.curation.score_clip import BUILT_IN, score_clip
from vidit.data.curation.stills import still_scores
from vidit.data.curation.text_area import text_area
from vidit.data.encode import encode_mp4
from vidit.data.limits import ClipError
from vidit.data.shard_writer import ShardWriter
from vidit.data.shards import read_index

Video = NDArray[np.uint8]


def texture(seed: int, height: int, width: int) -> Video:
    """Blurred noise in one tint, as rich in detail as a meadow."""
    noise = np.random.default_rng(seed).standard_normal((height, width, 1))
    blurred = cv2.GaussianBlur(noise, (0, 0), 2)[..., None]
    return np.clip((128 + 45 * blurred / blurred.std()) * (0.8, 1.0, 0.6), 0, 255).astype(np.uint8)


def pan(offsets: list[int], height: int = 120, width: int = 160, seed: int = 0) -> Video:
    """A camera that looks at column ``offset`` of a large picture in each frame."""
    base, least = texture(seed, height, width + max(offsets) - min(offsets)), min(offsets)
    return np.stack([base[:, offset - least : offset - least + width] for offset in offsets])


def scored(tmp_path: Path, frames_THWC: Video, fps: float = 24.0) -> Row:
    folder = tmp_path / "one"
    folder.mkdir()
    num_frames, height, width, _ = frames_THWC.shape
    facts = {"caption": "a clip", "fps": fps, "num_frames": num_frames, "width": width, "height": height}
    with ShardWriter(folder, 10) as writer:
        writer.add("one", encode_mp4(frames_THWC, fps), facts, "mp4")
        writer.close()
    (ref,) = read_index(folder)
    return score_clip((ref, (), True))


def scores(tmp_path: Path, frames_THWC: Video, fps: float = 24.0) -> dict[str, float]:
    row = scored(tmp_path, frames_THWC, fps)
    assert not row.fault
    return dict(row.by[BUILT_IN])


@pytest.mark.parametrize(
    ("step_px", "fps", "size"), [(1, 24.0, (120, 160)), (2, 24.0, (240, 320)), (3, 12.0, (60, 80))]
)
def test_motion_of_a_pan_is_its_speed(tmp_path: Path, step_px: int, fps: float, size: tuple[int, int]) -> None:
    frames = pan([step_px * i for i in range(30)], *size)
    truth = 100 * step_px * fps / min(size)
    found = scores(tmp_path, frames, fps)
    assert found["motion"] == pytest.approx(truth, rel=0.2)
    assert found["static"] == found["jitter"] == found["cuts"] == 0


def test_a_thing_that_moves_counts_by_its_area(tmp_path: Path) -> None:
    """A square of a quarter of the picture, 2 pixels a frame on a resting ground."""
    ground, thing = texture(1, 120, 160), texture(2, 80, 60)
    frames = np.stack([ground] * 24)
    for index, frame in enumerate(frames):
        frame[20:100, 20 + 2 * index : 80 + 2 * index] = thing
    truth = 0.25 * 100 * 2 * 24 / 120
    assert scores(tmp_path, frames)["motion"] == pytest.approx(truth, rel=0.2)


def test_sensor_noise_is_no_motion_on_texture_and_on_a_flat_wall(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 3, (24, 120, 160, 3))
    for name, still in (("meadow", texture(0, 120, 160)), ("wall", np.full((120, 160, 3), 128, np.uint8))):
        (tmp_path / name).mkdir()
        found = scores(tmp_path / name, np.clip(still + noise, 0, 255).astype(np.uint8))
        assert found["motion"] < 1.0, name
        assert found["static"] == 1.0, name


def test_a_clip_that_freezes_half_way_is_half_static(tmp_path: Path) -> None:
    frames = pan([2 * min(i, 48) for i in range(96)])
    assert scores(tmp_path, frames)["static"] == pytest.approx(0.5, abs=0.13)


def test_shake_is_told_from_a_pan(tmp_path: Path) -> None:
    """The camera turns back every 1/12 s, which is every other frame."""
    shaken = pan([4 * (i // 2 % 2) for i in range(48)])
    speed = 100 * 4 * 12 / 120
    found = scores(tmp_path, shaken)
    assert found["jitter"] == pytest.approx(speed, rel=0.2)
    assert found["motion"] == pytest.approx(speed, rel=0.2)


@pytest.mark.parametrize("cuts", [[13], [2], [5, 40], [47]])
def test_hard_cuts_are_found_at_their_frames(tmp_path: Path, cuts: list[int]) -> None:
    bounds = [0, *cuts, 48]
    parts = [
        np.stack([np.roll(texture(9, 120, 160), 40 * i, axis=-1) // 2 + 100 * (i % 2)] * (end - start))
        for i, (start, end) in enumerate(pairwise(bounds))
    ]
    row = scored(tmp_path, np.concatenate(parts).astype(np.uint8))
    assert list(row.cut_frames) == cuts
    assert row.by[BUILT_IN]["cuts"] == len(cuts)
    assert row.by[BUILT_IN]["cut_peak"] >= 27
    assert row.by[BUILT_IN]["motion"] < 1, "flow across a cut is none"


@pytest.mark.parametrize(
    ("bars", "share"), [((0, 0, 0, 0), 0.0), ((15, 15, 0, 0), 0.25), ((0, 30, 0, 0), 0.25), ((12, 12, 16, 16), 0.36)]
)
def test_black_bars(tmp_path: Path, bars: tuple[int, int, int, int], share: float) -> None:
    top, bottom, left, right = bars
    frames = pan([2 * i for i in range(12)])
    frames[:, :top], frames[:, 120 - bottom :], frames[:, :, :left], frames[:, :, 160 - right :] = 0, 0, 0, 0
    assert scores(tmp_path, frames)["black_border"] == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("size", [0.5, 0.8, 1.2])
@pytest.mark.parametrize("ink", [255, 10])
def test_text_area_is_that_of_the_lines(size: float, ink: int) -> None:
    plain, text = texture(3, 360, 640) // 3 + 80, "a caption on a picture"
    written = plain.copy()
    (width, height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_DUPLEX, size, 1)
    cv2.putText(written, text, (20, 300), cv2.FONT_HERSHEY_DUPLEX, size, (ink,) * 3, 1, cv2.LINE_AA)
    assert text_area(plain) == 0
    share = width * (height + below) / plain[..., 0].size
    assert 0.6 * share < text_area(written) < 1.2 * share
    assert still_scores([plain, written])["text_area"] == pytest.approx(text_area(written) / 2)


def test_bars_and_noise_are_hardly_text() -> None:
    bars = texture(3, 360, 640) // 3 + 80
    bars[::40], bars[:, 100:104] = 250, 250
    noise = np.random.default_rng(0).integers(0, 256, (360, 640, 3)).astype(np.uint8)
    assert text_area(bars) == 0
    assert text_area(noise) < 0.05


def test_a_dark_picture_has_no_bars_where_it_is_lit_once(tmp_path: Path) -> None:
    frames = np.zeros((12, 120, 160, 3), np.uint8)
    frames[6:] = texture(0, 120, 160)
    assert scores(tmp_path, frames)["black_border"] == 0


def test_light_contrast_and_sharpness(tmp_path: Path) -> None:
    half = np.full((8, 120, 160, 3), 60, np.uint8)
    half[:, :, 80:] = 180
    found = scores(tmp_path, half)
    assert found["brightness"] == pytest.approx(120, abs=2)
    assert found["contrast"] == pytest.approx(60, abs=2)
    sharp = np.stack([texture(0, 120, 160)] * 8)
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 3) for frame in sharp])
    for name in "ab":
        (tmp_path / name).mkdir()
    assert scores(tmp_path / "a", sharp)["sharpness"] > 5 * scores(tmp_path / "b", blurred)["sharpness"]


def test_facts(tmp_path: Path) -> None:
    found = scores(tmp_path, pan([0] * 36), fps=12.0)
    assert (found["duration_s"], found["num_frames"], found["fps"], found["aspect"]) == (3, 36, 12, 1.3333)
    assert (found["width"], found["height"]) == (160, 120)
    assert 0 < found["bits_per_pixel"] < 1


def test_a_clip_of_one_frame_stands_still(tmp_path: Path) -> None:
    found = scores(tmp_path, pan([0]))
    assert (found["motion"], found["static"], found["jitter"], found["cuts"]) == (0, 1, 0, 0)


def test_few_frames_a_second_are_compared_with_their_neighbours() -> None:
    meter, frames = MotionMeter(), pan([2 * i for i in range(9)])
    for index, frame in enumerate(frames):
        meter.add(index / 4, frame, False)
    assert meter.scores()["motion"] == pytest.approx(100 * 2 * 4 / 120, rel=0.2)


def test_frames_come_in_order_small_and_upright() -> None:
    video = encode_mp4(pan([0, 4, 8, 12], 96, 200), 8.0)
    with streamed(video) as stream:
        frames = [(frame.index, frame.time_s, frame.picture(48).shape) for frame in stream]
        assert stream.shown_at([0.0, 0.49, 0.5, 0.99]) == [0, 1, 2, 3]
    assert frames == [(i, i / 8, (48, 100, 3)) for i in range(4)]
    with streamed(video) as stream:
        assert {frame.picture(500).shape for frame in stream} == {(96, 200, 3)}


def test_a_file_that_is_no_video_is_refused() -> None:
    with pytest.raises(ClipError), streamed(b"RIFF nothing"):
        pass


def test_flash_counts_both_ways() -> None:
    finder = CutFinder(24.0)
    for index in range(10):
        finder.add(index, np.full((40, 40, 3), 250 if index == 5 else 20, np.uint8))
    assert finder.frames == [5, 6]
