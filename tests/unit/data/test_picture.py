"""Pictures: antialiased, cut where asked, the right way up."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vidit.data.encode import encode_mp4
from vidit.data.limits import ClipError
from vidit.data.video import decode_clip, probe


def picture(height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """A picture without any symmetry: red grows to the right, green downwards, one blue corner."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([255 * x / (width - 1), 255 * y / (height - 1), 0 * x], axis=-1).round().astype(np.uint8)
    image[: height // 4, : width // 4, 2] = 255
    return image


def moving(num_frames: int = 9, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    return np.stack([np.roll(picture(height, width), 2 * index, axis=1) for index in range(num_frames)])


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

    def test_too_elongated(self) -> None:
        data = encode_mp4(np.zeros((2, 16, 4096, 3), np.uint8), fps=8)
        with pytest.raises(ClipError, match="exceed the limit"):
            decode_clip(data, num_frames=1, fps=0, height=1024, width=16)


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
