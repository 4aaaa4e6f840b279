"""The frames of a window decoded by torchcodec: on the processor, or by NVDEC on a CUDA device.

`vidit/data/video.py` has found out which frames are shown when, and how the picture lies; what is decoded here is what
it would decode, resized by torch's antialiased bicubic instead of libswscale's, so pixels differ by a grey level or
two. An option of its own therefore, and not what happens to be installed, says which of them a run has.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidit.data.limits import ClipError, check_pixels
from vidit.data.picture import Orientation
from vidit.data.timeline import Timeline


def require_decoder(decoder: str) -> None:
    """ValueError where this machine has not what `data.decoder` needs."""
    if decoder != "pyav":
        torchcodec_decoders()
    if decoder == "nvdec" and not torch.cuda.is_available():
        raise ValueError("data.decoder=nvdec needs a CUDA device, and there is none; set data.decoder=pyav")


def torchcodec_decoders() -> Any:
    """The module. ValueError where it is not installed, or finds no FFmpeg."""
    try:
        import torchcodec.decoders  # type: ignore[import-not-found, unused-ignore]
    except (ImportError, OSError, RuntimeError) as error:
        last = str(error).strip().rpartition("\n")[2]
        raise ValueError(
            f"data.decoder=torchcodec or nvdec needs the package torchcodec and the FFmpeg libraries ({last}); install "
            "them (pip install torchcodec, apt install ffmpeg), or set data.decoder=pyav"
        ) from error
    return torchcodec.decoders


def read_window(
    data: bytes,
    stream_index: int,
    timeline: Timeline,
    targets: Sequence[int],
    orientation: Orientation,
    pixel_aspect: float,
    size: tuple[int, int],
    crop_fraction: tuple[float, float],
    device: str,
) -> Tensor:
    """The frames shown at `targets` (pts), cut to `size` (height, width): uint8 (T, height, width, 3), on the CPU.

    ClipError for what does not decode.
    """
    decoders = torchcodec_decoders()
    try:
        decoder = decoders.VideoDecoder(data, stream_index=stream_index, device=device, num_ffmpeg_threads=1)
        frames_TCHW: Tensor = decoder.get_frames_played_at([_middle_s(timeline, pts) for pts in targets]).data
    except (RuntimeError, IndexError, ValueError) as error:
        raise ClipError(f"torchcodec does not decode it: {str(error).strip().splitlines()[0]}") from error
    # It has turned the picture by the angle that it read out of the display matrix, which is no angle for a mirror.
    coded_TCHW = frames_TCHW.rot90(-round((decoder.metadata.rotation or 0) / 90), (2, 3))
    shown_TCHW = coded_TCHW.transpose(2, 3) if orientation.transpose else coded_TCHW
    flips = [dim for dim, is_set in ((2, orientation.flip_rows), (3, orientation.flip_cols)) if is_set]
    aspect = 1 / pixel_aspect if orientation.transpose else pixel_aspect
    return _cut(shown_TCHW.flip(flips), aspect, size, crop_fraction).permute(0, 2, 3, 1).contiguous().cpu()


def _middle_s(timeline: Timeline, pts: int) -> float:
    """Seconds in the middle of a frame's time on screen, far from rounding errors."""
    following = bisect_right(timeline.pts, pts)
    end = timeline.pts[following] if following < len(timeline.pts) else timeline.end
    return float((pts + end) / 2 * timeline.tick_s)


def _cut(frames_TCHW: Tensor, pixel_aspect: float, size: tuple[int, int], crop_fraction: tuple[float, float]) -> Tensor:
    """Resized until they cover `size`, then cut to it."""
    (height, width), shown_w = size, frames_TCHW.shape[3] * pixel_aspect
    scale = max(width / shown_w, height / frames_TCHW.shape[2])
    cover_h, cover_w = max(height, round(frames_TCHW.shape[2] * scale)), max(width, round(shown_w * scale))
    check_pixels(cover_w, cover_h)
    if (cover_h, cover_w) != tuple(frames_TCHW.shape[2:]):
        pixels = frames_TCHW if frames_TCHW.device.type == "cpu" else frames_TCHW.float()  # CUDA has no uint8 bicubic
        pixels = F.interpolate(pixels, (cover_h, cover_w), mode="bicubic", antialias=True)
        frames_TCHW = pixels if pixels.dtype == torch.uint8 else pixels.round().clamp(0, 255).to(torch.uint8)
    top, left = (round(part * (cover - side)) for part, cover, side in zip(
        crop_fraction, (cover_h, cover_w), size, strict=True
    ))  # fmt: skip
    return frames_TCHW[:, :, top : top + height, left : left + width]
