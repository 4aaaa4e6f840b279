"""Clips as they were read, one by one and side by side: as pixels, or as the latents that `vidit encode` made."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vidit.data.encoded import CaptionText, EncodedClip


@dataclass
class Clips:
    """Clips side by side: pixels (n, T, H, W, 3) uint8, raw latents (n, C, T, H, W), or some of each.

    With both `encoded` are the places of the latents among the clips, and the pixels are of the others, in order.
    `fps` are the frames a second of each.
    """

    keys: list[str]
    pixels: Tensor | None = None
    latents: Tensor | None = None
    encoded: tuple[int, ...] = ()
    fps: tuple[float, ...] = ()


class Row(NamedTuple):
    """One clip as it was read: pixels (T, H, W, 3) uint8 or what is stored of it, its caption and frames a second."""

    key: str
    caption: str
    fps: float
    pixels: Tensor | None
    encoded: EncodedClip | None
    empty: CaptionText | None
    """What is stored of the empty caption."""

    def text(self, caption: str) -> CaptionText | None:
        """What is stored of its caption, or of the empty one where that stands in for it."""
        if self.encoded is None:
            return None
        return self.encoded.text if caption else self.empty


def clips_of(rows: Sequence[Row]) -> Clips:
    """Clips side by side."""
    pixels = [row.pixels for row in rows if row.pixels is not None]
    latents = [row.encoded.mean for row in rows if row.encoded is not None]
    places = tuple(place for place, row in enumerate(rows) if row.encoded is not None)
    return Clips(
        [row.key for row in rows],
        torch.stack(pixels) if pixels else None,
        torch.stack(latents) if latents else None,
        places if pixels and latents else (),
        tuple(row.fps for row in rows),
    )


def named(parts: Sequence[Clips]) -> Clips:
    """Clips of several shapes, side by side in name and rate alone."""
    names, fps = ([x for part in parts for x in getattr(part, name)] for name in ("keys", "fps"))
    return Clips(names, fps=tuple(fps))
