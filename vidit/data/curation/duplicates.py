"""Near-duplicates: perceptual hashes of clips, and which clips are copies of which.

A clip's hash is three 64-bit pHashes (Zauner 2010: the sign of the low frequencies of the picture's DCT, against
their median), of the frames at 1/6, 1/2 and 5/6 of its time. Size, bit rate and frame rate hardly change it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FRACTIONS = (1 / 6, 1 / 2, 5 / 6)
HASH_BITS = 64 * len(FRACTIONS)
BAND_BITS = 16
NUM_BANDS = HASH_BITS // BAND_BITS
MAX_DISTANCE = 2 * NUM_BANDS - 1
"""Bits. Two hashes this close agree in some band up to one bit, so probing each band and its 16 neighbours finds
every pair. One more bit would need 137 probes in place of 17."""
_SIDE, _LOW = 32, 8
_FLAT = 2.0
"""Grey levels. A picture that varies less is noise around one colour, and so would be its hash."""


def clip_hash(stills: Sequence[NDArray[np.uint8]]) -> int:
    """The hash of the stills at ``FRACTIONS``, uint8 (H, W, 3) RGB, as one number of ``HASH_BITS`` bits."""
    value = 0
    for image_HWC in stills:
        value = value << 64 | _picture_hash(image_HWC)
    return value


def _picture_hash(image_HWC: NDArray[np.uint8]) -> int:
    import cv2

    luma = cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY)
    small = np.asarray(cv2.resize(luma, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA), dtype=np.float32)
    if small.std() < _FLAT:
        return 0
    low = np.asarray(cv2.dct(small))[:_LOW, :_LOW].ravel()
    bits = low > np.median(low[1:])  # the first is the mean, and would shift the median of the others
    return int("".join("1" if bit else "0" for bit in bits), 2)


def find_duplicates(hashes: Sequence[int], max_distance: int) -> list[tuple[int, int] | None]:
    """For each hash the (place, distance) of the first earlier one that it is a copy of, or None.

    A copy is at most ``max_distance`` bits (0 to ``MAX_DISTANCE``) from one that is itself no copy, so the order of
    ``hashes`` decides which of several is kept. Exact, and linear in their number but for crowded bands.
    """
    if not 0 <= max_distance <= MAX_DISTANCE:
        raise ValueError(f"a distance of {max_distance} bits cannot be searched; use 0 to {MAX_DISTANCE}")
    near = (0, *(1 << bit for bit in range(BAND_BITS))) if max_distance >= NUM_BANDS else (0,)
    bands: list[dict[int, list[int]]] = [{} for _ in range(NUM_BANDS)]
    found: list[tuple[int, int] | None] = []
    for place, value in enumerate(hashes):
        parts = [value >> BAND_BITS * band & (1 << BAND_BITS) - 1 for band in range(NUM_BANDS)]
        candidates = {
            other
            for table, part in zip(bands, parts, strict=True)
            for flip in near
            for other in table.get(part ^ flip, ())
        }
        close = [(other, (hashes[other] ^ value).bit_count()) for other in sorted(candidates)]
        match = next(((other, distance) for other, distance in close if distance <= max_distance), None)
        found.append(match)
        if match is None:
            for table, part in zip(bands, parts, strict=True):
                table.setdefault(part, []).append(place)
    return found
