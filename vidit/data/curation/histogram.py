"""A histogram as the numbers that an SVG needs: bars in pixels, ticks, and where the limits of a rule lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

WIDTH, HEIGHT, BASE = 340, 120, 100
"""Pixels of the drawing, and the height of its axis below the top."""
_MARGIN, _NUM_BINS = 8, 32
_LOG_ABOVE = 50
"""A positive score whose largest value is this many times the smallest is drawn on a logarithmic axis."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bin: kept clips stand on the axis, dropped ones on top of them. Pixels from the upper left."""

    x: float
    width: float
    kept_y: float
    kept_height: float
    dropped_y: float
    dropped_height: float
    label: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A place on the axis, in pixels, and what is written there."""

    x: float
    label: str
    anchor: str = "middle"


@dataclass(frozen=True, slots=True)
class Histogram:
    """What the template draws."""

    bars: tuple[Bar, ...]
    ticks: tuple[Mark, ...]
    limits: tuple[Mark, ...]
    is_log: bool


def histogram(values: Sequence[float], keeps: Sequence[bool], limits: Sequence[float] = ()) -> Histogram:
    """Bars over ``values``, of which ``keeps`` says which a rule keeps; its ``limits`` are drawn where in sight."""
    array, kept = np.asarray(values, dtype=np.float64), np.asarray(keeps, dtype=bool)
    low, high = float(array.min()), float(array.max())
    is_log = low > 0 and high / low > _LOG_ABOVE
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.geomspace(low, high, _NUM_BINS + 1) if is_log else np.linspace(low, high, _NUM_BINS + 1)
    edges[0], edges[-1] = low, high  # geomspace rounds, and the smallest and largest clip would fall out
    all_counts, kept_counts = np.histogram(array, edges)[0], np.histogram(array[kept], edges)[0]

    def place(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if is_log else (value - low) / (high - low)
        return round(_MARGIN + share * (WIDTH - 2 * _MARGIN), 1)

    bins = zip(pairwise(edges.tolist()), all_counts.tolist(), kept_counts.tolist(), strict=True)
    most = int(all_counts.max())
    bars = tuple(
        _bar(place(start), place(end), num, num_kept, most, f"{start:.3g} to {end:.3g}")
        for (start, end), num, num_kept in bins
        if num
    )
    middle = math.sqrt(low * high) if is_log else (low + high) / 2
    ends = Mark(place(low), f"{low:.3g}", "start"), Mark(place(high), f"{high:.3g}", "end")
    ticks = (ends[0], Mark(place(middle), f"{middle:.3g}"), ends[1])
    marks = tuple(Mark(place(limit), f"{limit:.3g}") for limit in limits if low <= limit <= high)
    return Histogram(bars, ticks, marks, is_log)


def _bar(x: float, end: float, num: int, num_kept: int, most: int, span: str) -> Bar:
    unit = (BASE - 10) / most
    # A bin with one clip among thousands must still be seen.
    total = max(num * unit, 1.5)
    kept = total * num_kept / num
    label = f"{span}: {num} clips" + ("" if num == num_kept else f", {num - num_kept} dropped")
    return Bar(
        x, round(max(end - x - 1, 1), 1), round(BASE - kept, 1), round(kept, 1), round(BASE - total, 1),
        round(total - kept, 1), label,
    )  # fmt: skip
