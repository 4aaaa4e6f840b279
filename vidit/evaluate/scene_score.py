"""Reads a video of coloured shapes back and marks it against its scene: colour, shape, direction, count.

Why: captions of `vidit.data.scenes` are exactly true, so a generated video can be marked against its caption
by image analysis alone. Method: blobs of saturated pixels (`scene_blobs`), one track for each thing, the
shape by the best overlap with drawn templates (`shape_match`), the direction by a line through the centroids.

Contract: nothing is raised for what a generator drew; a video in which nothing is found scores nothing.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vidit.data.scenes import COLOURS, SHAPES, Scene, Thing
from vidit.evaluate.scene_blobs import Blobs, find_blobs
from vidit.evaluate.shape_match import shape_overlaps

MIN_TRAVEL = 0.15  # of the frame, below which a thing rests: what moves in a scene travels 0.36 or more
MIN_OVERLAP = 0.6  # intersection over union below which a blob is like no shape: true ones reach 0.77
MAX_THINGS_A_COLOUR = 3


@dataclass(frozen=True)
class Reading:
    """One thing as the video shows it."""

    colour: str
    shape: str | None  # None: like no shape
    direction: str
    area: float  # of the frame, median over frames
    displacement: tuple[float, float]  # rightwards and downwards, of the frame's width and height
    overlap: float  # intersection over union with the nearest shape, 0..1
    num_frames: int  # in which it was found


@dataclass(frozen=True)
class SceneScore:
    """Fractions of a scene's things that were read right; None where the scene has nothing to score."""

    colour: float
    shape: float
    direction: float | None
    count: bool


Pair = tuple[Thing, Reading | None]


def read_things(frames_THW3: np.ndarray) -> list[Reading]:
    """The things in a video, uint8 (T, H, W, 3). Raises ValueError for an array of another kind."""
    if frames_THW3.dtype != np.uint8 or frames_THW3.ndim != 4 or frames_THW3.shape[-1] != 3:
        raise ValueError(f"frames are {frames_THW3.dtype} {frames_THW3.shape}; give uint8 (T, H, W, 3)")
    blobs = find_blobs(frames_THW3)
    overlap_NS = shape_overlaps(blobs, frames_THW3)
    return [_read(blobs, track, overlap_NS, frames_THW3.shape) for track in _tracks(blobs, len(frames_THW3))]


def score_scene(scene: Scene, frames_THW3: np.ndarray) -> SceneScore:
    """Marks a video, uint8 (T, H, W, 3), against the scene that its caption describes."""
    read = read_things(frames_THW3)
    pairs = _match(scene.things, read)
    return SceneScore(
        colour=_share([found is not None and found.colour == thing.colour for thing, found in pairs]),
        shape=_share([found is not None and found.shape == thing.shape for thing, found in pairs]),
        direction=_direction_score(pairs),
        count=len(read) == len(scene.things),
    )


def _direction_score(pairs: list[Pair]) -> float | None:
    right = [
        found is not None and found.direction == thing.direction
        for thing, found in pairs
        if thing.direction is not None
    ]
    return _share(right) if right else None


def _share(right: list[bool]) -> float:
    return sum(right) / len(right)


def _match(things: tuple[Thing, ...], read: list[Reading]) -> list[Pair]:
    """Pairs things with readings: most equal colours first, then most agreement in shape and direction."""

    def agreement(chosen: Iterable[Reading | None]) -> tuple[int, int]:
        pairs = [(thing, found) for thing, found in zip(things, chosen, strict=True) if found]
        colours = sum(thing.colour == found.colour for thing, found in pairs)
        shapes = sum(thing.shape == found.shape for thing, found in pairs)
        return colours, shapes + sum(thing.direction == found.direction for thing, found in pairs)

    # Six of the largest are plenty: three things have at most 120 ways to be matched with them.
    largest: list[Reading | None] = [*sorted(read, key=lambda reading: -reading.area)[:6]]
    largest += [None] * max(len(things) - len(largest), 0)
    return list(zip(things, max(itertools.permutations(largest, len(things)), key=agreement), strict=True))


def _tracks(blobs: Blobs, num_frames: int) -> list[list[int]]:
    """Groups blobs of one colour into things: as many as the median frame shows, linked to the nearest."""
    tracks = []
    for colour in np.unique(blobs.colour):
        mine = np.flatnonzero(blobs.colour == colour)
        by_frame = [mine[blobs.frame[mine] == frame] for frame in range(num_frames)]
        # A crumb beside a thing is not a second thing.
        by_frame = [group[blobs.area[group] > 0.25 * max(blobs.area[group], default=0)] for group in by_frame]
        num_things = min(int(np.median([len(group) for group in by_frame])), MAX_THINGS_A_COLOUR)
        tracks += _link(blobs, by_frame, num_things)
    return tracks


def _link(blobs: Blobs, by_frame: list[np.ndarray], num_things: int) -> list[list[int]]:
    """Follows the `num_things` largest blobs of each frame: each goes on to the nearest one still free."""
    tracks: list[list[int]] = [[] for _ in range(num_things)]
    for group in by_frame:
        free = list(group[np.argsort(-blobs.area[group])][:num_things])
        for track in sorted(tracks, key=len, reverse=True):
            if not free:
                break
            nearest = free[0]
            if track:
                last = track[-1]
                gap = np.hypot(blobs.x[free] - blobs.x[last], blobs.y[free] - blobs.y[last])
                nearest = free[int(gap.argmin())]
            track.append(nearest)
            free.remove(nearest)
    return [track for track in tracks if track]


def _read(blobs: Blobs, track: list[int], overlap_NS: np.ndarray, video_shape: tuple[int, ...]) -> Reading:
    _, height, width, _ = video_shape
    # A larger blob shows its shape better.
    overlap_S = np.average(overlap_NS[track], axis=0, weights=blobs.area[track])
    best = int(overlap_S.argmax())
    seen = blobs.frame[track]
    across = _travel(seen, blobs.x[track]) / width
    down = _travel(seen, blobs.y[track]) / height
    return Reading(
        colour=list(COLOURS)[blobs.colour[track[0]]],
        shape=SHAPES[best] if overlap_S[best] >= MIN_OVERLAP else None,
        direction=_direction(across, down),
        area=float(np.median(blobs.area[track])) / (height * width),
        displacement=(across, down),
        overlap=float(overlap_S[best]),
        num_frames=len(track),
    )


def _travel(seen: np.ndarray, place: np.ndarray) -> float:
    """How far a centroid goes from the first to the last frame, by the straight line that fits best."""
    offset = seen - seen.mean()
    spread = float(offset @ offset)
    return float(offset @ place) / spread * float(seen[-1] - seen[0]) if spread else 0.0


def _direction(across: float, down: float) -> str:
    if max(abs(across), abs(down)) < MIN_TRAVEL:
        return "still"
    if abs(across) >= abs(down):
        return "right" if across > 0 else "left"
    return "down" if down > 0 else "up"
