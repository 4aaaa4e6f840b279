"""Encoding: the frames come back, the same bytes each time, and wrong arguments are refused."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from vidit.data.encode import encode_mp4, write_gif
from vidit.data.video import decode_clip, probe


def moving(num_frames: int = 9, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """A ramp of colours that moves two pixels a frame."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([255 * x / (width - 1), 255 * y / (height - 1), 0 * x], axis=-1).round().astype(np.uint8)
    return np.stack([np.roll(image, 2 * index, axis=1) for index in range(num_frames)])


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

    def test_same_bytes_a_thousand_times(self) -> None:
        """Small flat pictures are where x264's macroblock tree gave other bytes, about once in a hundred."""
        frames, rng = np.full((5, 32, 32, 3), 9, np.uint8), np.random.default_rng(0)
        held: deque[bytes] = deque(maxlen=20)
        seen = set()
        for _ in range(1000):
            held.append(rng.bytes(rng.integers(1, 200_000)))  # what lies in freed memory differs each time
            seen.add(encode_mp4(frames, fps=8))
        assert len(seen) == 1

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
        with pytest.raises(ValueError, match="fps=0"):
            write_gif(tmp_path / "a.gif", moving(), 0)

    def test_a_gif_is_shown_at_50_frames_a_second_at_most(self, tmp_path: Path) -> None:
        for fps in (50, 60):
            write_gif(tmp_path / f"{fps}.gif", moving(), fps)
        assert (tmp_path / "50.gif").read_bytes() == (tmp_path / "60.gif").read_bytes()


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
