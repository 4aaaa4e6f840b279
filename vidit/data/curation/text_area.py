"""How much of a picture written text takes: captions, watermarks, signs.

Letters are small thin parts in one ink, all brighter or all darker than what is around them, of like height, side by
side on one line: found by top-hats and connected components, without weights.
Rows of windows or a fence may pass for text, and handwriting or single letters may not: of captions written over
24 real clips 64 % were found, and of their plain pictures 1 % passed for text, nearly all of it a clip of letter blocks
(`benchmarks/text_area.py`). An OCR model as a plug-in finds more.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

STROKES = (7, 15)
"""Pixels that a stroke is thinner than; two sizes of letters."""
MIN_CONTRAST = 60
"""Of 255, between a letter and what is around it."""
MIN_LETTERS = 5
"""On a line."""
MAX_LETTERS = 1500
"""In a picture: more small parts are grass or noise, and are left out from the right."""
MAX_SLOPE = 0.25

MAX_INKS = 10.0
"""Of 255: how far the luma of the letters of a line may spread."""

# Each a row of left, top, width, height, and the luma of its ink.
Letters = NDArray[np.int64]


def text_area(image_HWC: NDArray[np.uint8]) -> float:
    """Share of an RGB picture, uint8 (H, W, 3), that lines of text take, 0 to 1."""
    import cv2

    luma_HW = np.asarray(cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY), np.uint8)
    covered_HW = np.zeros(luma_HW.shape, bool)
    for picture_HW in (luma_HW, 255 - luma_HW):
        for size in STROKES:
            kernel = cv2.getStructuringElement(cv2.MORPH_RECT, (size, size))
            strokes_HW = np.asarray(cv2.morphologyEx(picture_HW, cv2.MORPH_TOPHAT, kernel)) > MIN_CONTRAST
            for line in _lines(_letters(strokes_HW, picture_HW)):
                (left, top), (right, bottom) = line[:, :2].min(0), (line[:, :2] + line[:, 2:4]).max(0)
                covered_HW[top:bottom, left:right] = True
    return float(covered_HW.mean())


def _letters(strokes_HW: NDArray[np.bool_], picture_HW: NDArray[np.uint8]) -> Letters:
    """Connected parts of the size and fill of letters, from left to right."""
    import cv2

    num, parts, found, _ = cv2.connectedComponentsWithStats(strokes_HW.astype(np.uint8), connectivity=8)
    left, _, width, height, area = np.asarray(found[1:], np.int64).T  # the first is all that is no stroke
    fits = (height >= 5) & (height <= 0.15 * strokes_HW.shape[0]) & (width <= 1.6 * height)
    fits &= (area >= 6) & (area >= 0.15 * width * height)
    ink = np.zeros(num, np.uint8)
    np.maximum.at(ink, np.asarray(parts, np.int32)[strokes_HW], picture_HW[strokes_HW])
    letters = np.stack((left, found[1:, 1], width, height, ink[1:]), 1)[fits].astype(np.int64)
    return letters[np.argsort(letters[:, 0], kind="stable")][:MAX_LETTERS]


def _lines(letters: Letters) -> Iterator[Letters]:
    """Chains of letters, each the nearest to the right of the one before, that stand on a line."""
    free = np.ones(len(letters), bool)
    for first in range(len(letters)):
        if not free[first]:
            continue
        chain, last = [first], first
        free[first] = False
        while (last := _following(letters, free, last)) >= 0:
            free[last] = False
            chain.append(last)
        if len(chain) >= MIN_LETTERS and _stands_on_a_line(letters[chain]):
            yield letters[chain]


def _following(letters: Letters, free: NDArray[np.bool_], last: int) -> int:
    """The letter next to the right of one, of like height and beside it; -1 where there is none."""
    left, top, width, height, _ = letters[last]
    other_left, other_top, _, other_height, _ = letters.T
    gap, tallest = other_left - (left + width), np.maximum(height, other_height)
    beside = np.minimum(top + height, other_top + other_height) - np.maximum(top, other_top)
    fits = free & (gap >= -0.3 * tallest) & (gap <= 1.2 * tallest)
    fits &= (other_height <= 2 * height) & (height <= 2 * other_height)
    fits &= beside >= 0.6 * np.minimum(height, other_height)
    return int(np.where(fits, gap, np.iinfo(np.int64).max).argmin()) if fits.any() else -1


def _stands_on_a_line(letters: Letters) -> bool:
    left, top, width, height, ink = letters.T
    middle, feet, typical = left + width / 2, top + height, float(np.median(height))
    slope, offset = np.polyfit(middle, feet, 1)
    off = np.median(np.abs(feet - (slope * middle + offset)))
    alike = ink.std() <= MAX_INKS and height.std() <= 0.4 * typical
    return bool(alike and abs(slope) <= MAX_SLOPE and off <= 0.12 * typical + 0.6)
