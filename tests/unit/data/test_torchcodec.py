"""Decoding by torchcodec: the frames, the turn and the cut that PyAV gives, where the package is there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vidit.data.encode import encode_mp4
from vidit.data.limits import ClipError
from vidit.data.video import decode_clip


def numbered(num: int, height: int, width: int) -> np.ndarray:
    """Frames that tell themselves apart by their blue, over ramps that are not symmetric."""
    frames = np.zeros((num, height, width, 3), np.uint8)
    frames[..., 0] = np.linspace(0, 200, width).astype(np.uint8)
    frames[..., 1] = np.linspace(0, 120, height).astype(np.uint8)[:, None]
    frames[..., 2] = (10 * np.arange(num))[:, None, None]
    return frames


def turned(video: bytes, orientation: str) -> bytes:
    """The same video with a display matrix (mp4's track header)."""
    matrices = {
        "90": (0, 1, -1, 0), "180": (-1, 0, 0, -1), "270": (0, -1, 1, 0), "mirror": (-1, 0, 0, 1),
        "flip": (1, 0, 0, -1), "across": (0, 1, 1, 0),
    }  # fmt: skip
    a, b, c, d = matrices[orientation]
    one, whole = 1 << 16, 1 << 30
    identity = [one, 0, 0, 0, one, 0, 0, 0, whole]
    matrix = [a * one, b * one, 0, c * one, d * one, 0, 0, 0, whole]
    packed = [b"".join(int(x & 0xFFFFFFFF).to_bytes(4, "big") for x in m) for m in (identity, matrix)]
    header = video.index(b"tkhd")
    at = video.index(packed[0], header)
    return video[:at] + packed[1] + video[at + 36 :]


@pytest.mark.usefixtures("torchcodec")
@pytest.mark.parametrize("orientation", ["", "90", "180", "270", "mirror", "flip", "across"])
@pytest.mark.parametrize(("fps", "start"), [(None, 0.5), (5.0, 0.0), (12.0, 1.0)])
def test_it_shows_what_pyav_shows(orientation: str, fps: float | None, start: float) -> None:
    video = encode_mp4(numbered(24, 72, 96), 10.0)
    if orientation:
        video = turned(video, orientation)
    asked = {
        "num_frames": 7,
        "fps": fps,
        "height": 48,
        "width": 40,
        "start_fraction": start,
        "crop_fraction": (0.2, 0.9),
    }
    ours, theirs = decode_clip(video, **asked), decode_clip(video, **asked, decoder="torchcodec")
    assert theirs.shape == ours.shape == (7, 48, 40, 3)
    apart = (ours.float() - theirs.float()).abs().mean((1, 2, 3))
    assert apart.max() < 3, apart
    for number in range(6):
        if not torch.equal(ours[number], ours[number + 1]):
            assert (ours[number].float() - ours[number + 1].float()).abs().mean() > 2 * apart.max()


@pytest.mark.usefixtures("torchcodec")
def test_a_damaged_video_is_a_clip_error() -> None:
    video = encode_mp4(numbered(24, 72, 96), 10.0)
    with pytest.raises(ClipError):
        decode_clip(video[: len(video) // 3], num_frames=5, fps=None, height=32, width=32, decoder="torchcodec")
