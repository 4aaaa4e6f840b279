"""What single frames tell: light, contrast, sharpness, text and black bars, over stills spread evenly over a clip."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vidit.data.curation.text_area import text_area

BLACK_BELOW = 24
"""Of 255. Codecs leave black at up to this level beside a sharp edge."""
_ROW_SHARE = 98
"""Percent of a row that must be black: a codec's stray dots do not end a bar."""


def still_scores(stills: Sequence[NDArray[np.uint8]]) -> dict[str, float]:
    """Scores of uint8 (H, W, 3) RGB pictures of one size.

    ``brightness`` mean luma and ``contrast`` its standard deviation within a picture, both 0 to 255; ``sharpness``
    the variance of the Laplacian, the median over the stills; ``text_area`` the mean share of a picture that text
    takes; ``black_border`` the share of the picture that bars at its edges take, black in every still.
    """
    import cv2

    lumas = [np.asarray(cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY)) for image_HWC in stills]
    return {
        "brightness": float(np.mean([luma.mean() for luma in lumas])),
        "contrast": float(np.mean([luma.std() for luma in lumas])),
        "sharpness": float(np.median([cv2.Laplacian(luma, cv2.CV_64F).var() for luma in lumas])),
        "text_area": float(np.mean([text_area(image_HWC) for image_HWC in stills])),
        "black_border": _black_border(np.max(lumas, axis=0)),
    }


def _black_border(brightest_HW: NDArray[np.uint8]) -> float:
    rows, columns = (np.percentile(brightest_HW, _ROW_SHARE, axis=axis) >= BLACK_BELOW for axis in (1, 0))
    if not rows.any() or not columns.any():
        return 1.0
    height, width = (int(np.flatnonzero(lit)[-1] - np.flatnonzero(lit)[0] + 1) for lit in (rows, columns))
    return 1 - height * width / brightest_HW.size
