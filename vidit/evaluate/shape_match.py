"""Names the shape of a blob: its overlap with drawn templates of every shape at every angle.

Each blob is cut out, moved to the middle and scaled to area 1, so one small set of templates serves all
sizes. A sample belongs to the thing where its colour is nearer to the thing's than to the background's: in a
compressed video brightness has a finer edge than hue, whose resolution is halved, and small stars need it.
"""

import functools
import itertools

import numpy as np

from vidit.data.scene_render import coverage
from vidit.data.scenes import SHAPES
from vidit.evaluate.scene_blobs import Blobs

_GRID = 28  # samples a side of a picture
_SPAN = 1.15  # half its side, in units of the square root of the blob's area
_SCALES = (0.86, 0.93, 1.0, 1.07)  # of a template: the area of a blob is only known to a ring of half pixels
# Blur of a template, in the same unit: 0.15 is about a pixel on the smallest things. Without it small stars
# are read as squares; with 0.2 a star becomes a circle, and blurred squares take circles over.
_BLURS = {"circle": (0.0,), "square": (0.0,), "triangle": (0.0, 0.15), "star": (0.0, 0.15)}
_FOLDS = {"circle": 4, "square": 4, "triangle": 3, "star": 5}  # turns by 1/fold of a circle change nothing
_NUM_ANGLES = {"circle": 1, "square": 15, "triangle": 20, "star": 12}


def shape_overlaps(blobs: Blobs, frames_THW3: np.ndarray) -> np.ndarray:
    """(N, shapes) in 0..1: intersection over union of each blob with each of `SHAPES` at its best angle."""
    templates_KP, first = _templates()
    pictures_NP = _pictures(blobs, frames_THW3)
    # Not `@`: its threads wait for each other on a busy machine, 31 ms where this loop takes 2.
    both: np.ndarray = np.einsum("np,kp->nk", pictures_NP, templates_KP)
    either = pictures_NP.sum(axis=1)[:, None] + templates_KP.sum(axis=1) - both
    best: np.ndarray = np.maximum.reduceat(both / either, first, axis=1)
    return best


def _pictures(blobs: Blobs, frames_THW3: np.ndarray) -> np.ndarray:
    """(N, pixels) of 0 or 1: where a blob is, after it was moved to the middle and scaled to area 1."""
    grid = np.sqrt(blobs.area)[:, None] * _grid_line()
    x, y = (blobs.x[:, None] + grid - 0.5)[:, None, :], (blobs.y[:, None] + grid - 0.5)[:, :, None]
    label, rgb = _sample(blobs, frames_THW3, x, y)
    mine = label == np.arange(len(label))[:, None, None]
    free = label == -1
    strength = np.where(mine, rgb.max(axis=-1) - rgb.min(axis=-1), 0)
    # The edge of a blob is a mixture; what is nearly as saturated as its middle is the thing's own colour.
    thing = _mean(rgb, strength > 0.85 * strength.max(axis=(1, 2), keepdims=True))
    ground = _mean(rgb, free)
    step = (thing - ground)[:, None, None]
    nearer = ((rgb - ground[:, None, None]) * step).sum(axis=-1) > 0.5 * (step**2).sum(axis=-1)
    picture: np.ndarray = nearer & (mine | free)
    return picture.reshape(len(label), _GRID * _GRID).astype(np.float32)


def _sample(
    blobs: Blobs, frames_THW3: np.ndarray, x_N1G: np.ndarray, y_NG1: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Blob numbers (N, G, G) of the nearest pixels, -2 outside the frame; colours (N, G, G, 3), bilinear."""
    _, height, width, _ = frames_THW3.shape
    frame = blobs.frame[:, None, None]
    left, top = np.floor(x_N1G).astype(int), np.floor(y_NG1).astype(int)
    rgb = np.zeros((len(blobs.frame), _GRID, _GRID, 3), dtype=np.float32)
    for row, column in itertools.product((top, top + 1), (left, left + 1)):
        weight = ((1 - np.abs(x_N1G - column)) * (1 - np.abs(y_NG1 - row))).astype(np.float32)
        rgb += weight[..., None] * frames_THW3[frame, row.clip(0, height - 1), column.clip(0, width - 1)]
    row, column = np.rint(y_NG1).astype(int), np.rint(x_N1G).astype(int)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    label = blobs.labels[frame, row.clip(0, height - 1), column.clip(0, width - 1)]
    return np.where(inside, label, -2), rgb


def _mean(rgb_NGG3: np.ndarray, mask_NGG: np.ndarray) -> np.ndarray:
    """(N, 3): the mean colour under each mask, black where it is empty."""
    total: np.ndarray = (rgb_NGG3 * mask_NGG[..., None]).sum(axis=(1, 2))
    num_samples: np.ndarray = mask_NGG.sum(axis=(1, 2), dtype=np.float32)
    mean: np.ndarray = total / num_samples.clip(min=1)[:, None]
    return mean


def _grid_line() -> np.ndarray:
    """(G,): the positions of the samples along one side, in units of the square root of the area."""
    return (np.arange(_GRID) + 0.5) * (2 * _SPAN / _GRID) - _SPAN


@functools.cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """(K, pixels) of 0 or 1: drawn shapes of area 1, and where the templates of each shape begin."""
    samples_a_unit = _GRID / (2 * _SPAN)
    axis = _grid_line() * samples_a_unit
    pictures: list[np.ndarray] = []
    first = []
    for shape in SHAPES:
        first.append(len(pictures))
        angles = np.arange(_NUM_ANGLES[shape]) * (2 * np.pi / _FOLDS[shape] / _NUM_ANGLES[shape])
        for angle, scale, blur in itertools.product(angles, _SCALES, _BLURS[shape]):
            radius = scale * samples_a_unit / np.sqrt(_unit_area(shape))
            drawn = coverage(shape, axis[None, :], axis[:, None], radius, angle)
            pictures.append(_blurred(drawn, blur).ravel() > 0.5)
    return np.array(pictures, dtype=np.float32), np.array(first)


def _unit_area(shape: str) -> float:
    """The area of a shape whose bounding radius is 1."""
    axis = np.arange(-101, 102)
    return float(coverage(shape, axis[None, :], axis[:, None], 100.0, 0.0).sum()) / 100.0**2


def _blurred(picture: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian blur of this width, in units of the square root of the area."""
    if sigma == 0:
        return picture
    line = _grid_line()
    weight = np.exp(-0.5 * ((line[:, None] - line) / sigma) ** 2)
    weight /= weight.sum(axis=1, keepdims=True)
    blurred: np.ndarray = weight @ picture @ weight.T
    return blurred
