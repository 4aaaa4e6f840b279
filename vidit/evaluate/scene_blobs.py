"""Finds coloured blobs in a video: saturated pixels, sorted by hue, joined where they touch.

Contract: any uint8 video gives an answer, also none; nothing is raised for what a bad generator drew. The
background is taken to be grey or weakly tinted, as `vidit.data.scenes` draws it.
"""

from dataclasses import dataclass

import numpy as np

from vidit.data.scenes import COLOURS

MIN_CHROMA = 48  # levels between the largest and the smallest of R, G, B: backgrounds stay below 30
MIN_AREA = 0.004  # of the frame: the smallest thing that is drawn covers 0.006
MAX_AREA = 0.35  # of the frame: more than that is a background


@dataclass(frozen=True)
class Blobs:
    """All blobs of a video, N of them; each field but the first is (N,)."""

    labels: np.ndarray  # (T, H, W) the number of the blob that a pixel is in, or -1
    frame: np.ndarray
    colour: np.ndarray  # position in COLOURS
    area: np.ndarray  # pixels
    x: np.ndarray  # centroid, pixels
    y: np.ndarray


def find_blobs(frames_THW3: np.ndarray) -> Blobs:
    """The connected regions of one colour in each frame of a uint8 video, where they have a thing's size."""
    colour_THW = _colour_of_pixels(frames_THW3)
    root_THW = _connect(colour_THW)
    _, height, width = colour_THW.shape
    where = np.flatnonzero(colour_THW >= 0)
    roots, label, area = np.unique(root_THW.ravel()[where], return_inverse=True, return_counts=True)
    keep = (area >= MIN_AREA * height * width) & (area <= MAX_AREA * height * width)
    number = np.where(keep, np.cumsum(keep) - 1, -1)
    label_THW = np.full(colour_THW.size, -1, dtype=np.int32)
    label_THW[where] = number[label]
    x = np.bincount(label, where % width + 0.5, minlength=len(roots)) / area
    y = np.bincount(label, where // width % height + 0.5, minlength=len(roots)) / area
    return Blobs(
        labels=label_THW.reshape(colour_THW.shape),
        frame=(roots // (height * width))[keep],
        colour=colour_THW.ravel()[roots[keep]],
        area=area[keep],
        x=x[keep],
        y=y[keep],
    )


def _colour_of_pixels(frames_THW3: np.ndarray) -> np.ndarray:
    """int8 (T, H, W): the position in COLOURS of the nearest hue, -1 where a pixel is not saturated."""
    red, green, blue = np.moveaxis(frames_THW3, -1, 0)
    chroma_THW = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    colour_THW = np.full(chroma_THW.shape, -1, dtype=np.int8)
    saturated = np.flatnonzero(chroma_THW > MIN_CHROMA)
    chroma = chroma_THW.ravel()[saturated]
    colour = _nearest_hue(frames_THW3.reshape(-1, 3)[saturated])
    for index in range(len(COLOURS)):
        mine = colour == index
        if mine.any():
            # Half of the colour's own strength is the edge between it and grey, whatever a blur did to both.
            strong = mine & (chroma > 0.5 * np.percentile(chroma[mine], 90))
            colour_THW.ravel()[saturated[strong]] = index
    return colour_THW


def _nearest_hue(pixels_N3: np.ndarray) -> np.ndarray:
    """(N, 3) saturated RGB -> (N,) position in COLOURS."""
    names_C2 = _hue_vector(np.array(list(COLOURS.values())))
    names_C2 /= np.linalg.norm(names_C2, axis=1, keepdims=True)
    # The largest projection is the smallest angle.
    nearest: np.ndarray = np.einsum("nd,cd->nc", _hue_vector(pixels_N3), names_C2).argmax(axis=1)
    return nearest


def _hue_vector(pixels_N3: np.ndarray) -> np.ndarray:
    """(N, 3) RGB -> (N, 2): the projection along the grey axis, whose angle is the hue."""
    red, green, blue = pixels_N3.astype(np.float32).T
    return np.stack([2 * red - green - blue, np.float32(3**0.5) * (green - blue)], axis=-1)


def _connect(colour_THW: np.ndarray) -> np.ndarray:
    """Numbers regions: each pixel gets the flat position of one pixel of its region, the same for all.

    Neighbours hand on the larger number, and every pixel then jumps to the number of the one it points at: a
    few rounds, where handing on alone would take as many as a region is long.
    """
    root_THW = np.arange(colour_THW.size, dtype=np.int32).reshape(colour_THW.shape)
    right = (colour_THW[:, :, 1:] == colour_THW[:, :, :-1]) & (colour_THW[:, :, 1:] >= 0)
    below = (colour_THW[:, 1:] == colour_THW[:, :-1]) & (colour_THW[:, 1:] >= 0)
    while True:
        before = root_THW.copy()
        for joined, a, b in (
            (right, root_THW[:, :, :-1], root_THW[:, :, 1:]),
            (below, root_THW[:, :-1], root_THW[:, 1:]),
        ):
            np.maximum(a, b, out=a, where=joined)
            np.maximum(a, b, out=b, where=joined)
        root_THW = root_THW.ravel()[root_THW]
        if np.array_equal(root_THW, before):
            return root_THW
