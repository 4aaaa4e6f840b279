"""What a scene is: its vocabulary and the frozen values that describe one clip.

Geometry is in pixels of the frame, x to the right and y down, with (0, 0) the outer corner of the first
pixel; time runs from 0 (first frame) to 1 (last frame); angles are radians, clockwise on the screen.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (226, 38, 38),
    "yellow": (246, 214, 32),
    "green": (36, 178, 62),
    "cyan": (28, 206, 218),
    "blue": (34, 80, 236),
    "purple": (168, 44, 220),
}
SHAPES = ("circle", "square", "triangle", "star")
DIRECTIONS = ("left", "right", "up", "down", "still")
MOTIONS = ("left", "right", "up", "down", "grow", "shrink", "turn", "collide")
TEXTURES = ("plain", "gradient", "striped", "checked", "dotted", "cloudy")

# Every colour once and every shape at least once.
HELD_OUT = (
    ("red", "triangle"),
    ("yellow", "star"),
    ("green", "circle"),
    ("cyan", "square"),
    ("blue", "star"),
    ("purple", "circle"),
)

Split = Literal["train", "held_out"]


def keyed_generator(*key: int | str) -> np.random.Generator:
    """A generator whose stream depends on `key` only: the same on every machine and in every process."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


@dataclass(frozen=True)
class Pose:
    """Where a thing is at one time: centre (x, y) and bounding radius in pixels, angle in radians."""

    time: float
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Thing:
    """One coloured shape. `poses` are key frames in order of time, with straight lines between them."""

    shape: str
    colour: str
    motion: str
    poses: tuple[Pose, ...]

    @property
    def direction(self) -> str | None:
        """One of `DIRECTIONS`, or None for a thing that collides: it goes both ways."""
        if self.motion == "collide":
            return None
        return self.motion if self.motion in DIRECTIONS else "still"

    def at(self, times: np.ndarray) -> np.ndarray:
        """(N,) times in 0..1 -> (N, 4) float64: x, y, radius, angle."""
        # Spelt out: dataclasses.astuple copies deeply, which took most of the time of placing three things.
        keys = np.array([(key.time, key.x, key.y, key.radius, key.angle) for key in self.poses])
        return np.stack([np.interp(times, keys[:, 0], keys[:, dim]) for dim in range(1, 5)], axis=-1)


@dataclass(frozen=True)
class Background:
    """A texture between two greys, weakly tinted so that segmentation by saturation stays well posed."""

    texture: str
    dark: tuple[int, int, int]
    light: tuple[int, int, int]
    period: float  # pixels
    angle: float
    drift: tuple[float, float]  # pixels over the whole clip


@dataclass(frozen=True)
class Scene:
    """All that decides the pixels and the caption of one clip; `seed` keys what else is left to chance."""

    things: tuple[Thing, ...]
    background: Background
    num_frames: int
    height: int
    width: int
    fps: int
    seed: int

    @property
    def times(self) -> np.ndarray:
        """(T,) float64: the time of each frame in 0..1."""
        return np.arange(self.num_frames) / max(self.num_frames - 1, 1)

    def to_json(self) -> dict[str, Any]:
        """A dict of numbers, strings, lists and dicts that `json.dumps` accepts."""
        return dataclasses.asdict(self)
