"""Frames to video files: H.264 in an mp4, and looping GIFs, the same bytes from the same frames."""

from __future__ import annotations

import io
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from numpy.typing import NDArray

from vidit.data.limits import MAX_PIXELS
from vidit.data.picture import INTERPOLATION

# A lookahead of 8 frames costs a fifth less time than the preset's 10 to 20 and gives the same size. The macroblock
# tree reads memory that nothing wrote: with it about 1 file in 100 has other bytes for the same frames.
_X264 = {"preset": "veryfast", "rc-lookahead": "8", "mbtree": "0"}
_AVCOL_BT709 = 1

Frames = NDArray[np.uint8] | torch.Tensor

MAX_GIF_FPS = 50.0


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
        interpolation=INTERPOLATION,
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        threads=1,
    )


def write_gif(path: Path | BinaryIO, frames: Frames, fps: float, scale: int = 1) -> None:
    """Write a looping GIF. ``frames``: uint8 (T, H, W, 3); ``scale`` repeats every pixel that many times.

    One palette of 256 colours is fitted to the whole clip, so colours do not flicker from frame to frame.
    GIF counts in 10 ms: the delays alternate so that the mean rate is right. Players run no faster than
    ``MAX_GIF_FPS``, so a faster clip is shown at that rate. Raises ValueError for a wrong array, rate or scale.
    """
    from PIL import Image

    frames_THWC = _checked_frames(frames)
    if not fps > 0:
        raise ValueError(f"fps={fps} cannot be shown; use a rate above 0")
    fps = min(fps, MAX_GIF_FPS)
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
