"""Places the things of a scene: a path for each, wholly inside the frame and clear of the others.

Contract: at every time the bounding circle of a thing lies inside the frame, and those of two things keep
`GAP` apart; two that collide touch at the frame of their contact and are apart before and after it. Found by
rejection: draw, look, draw again, with slightly smaller things each time a whole scene fails.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vidit.data.scene_types import Pose, Thing

# Bounding radius by the number of things, as fractions of the short side of the frame.
RADII = {1: (0.22, 0.29), 2: (0.175, 0.22), 3: (0.135, 0.165)}
MIN_TRAVEL = 0.36  # of the side along the motion
MAX_TRAVEL = 0.6
MARGIN = 0.015  # between a thing and the border, of the short side
GAP = 0.04  # between the bounding circles of two things, of the short side
Look = tuple[str, str]  # colour, shape
Point = tuple[float, float]
_CHECKED_TIMES = np.linspace(0, 1, 33)
_STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_NUM_CORNERS = {"square": 4, "triangle": 3, "star": 5}


def place_things(
    rng: np.random.Generator,
    looks: list[Look],
    motions: list[str],
    num_frames: int,
    height: int,
    width: int,
) -> tuple[Thing, ...]:
    """Things with these looks and motions, in this order. Raises RuntimeError if there is no room."""
    for attempt in range(400):
        layout = _Layout(rng, height, width, num_frames, shrink=0.985 ** (attempt // 2), count=len(looks))
        things = layout.fill(looks, motions)
        if things is not None:
            return things
    raise RuntimeError(f"no room for {len(looks)} things in {height}x{width} pixels after 400 attempts")


@dataclass(frozen=True)
class _Collider:
    """One of two that meet on a line along `axis` (0: x, 1: y); `side` is where it comes from: -1 or 1."""

    colour: str
    shape: str
    side: int
    radius: float
    angle: float
    axis: int

    @property
    def reach(self) -> float:
        """From the centre to the foremost corner, in pixels."""
        return self.radius * _support(self.shape, self.angle, self.axis, -self.side)

    def bounce(self, contact: float, across: float, distances: Sequence[tuple[float, float]]) -> Thing:
        """The thing whose foremost corner is at each (time, distance from the point of contact)."""
        poses = []
        for time, distance in distances:
            along = float(contact + self.side * (self.reach + distance))
            x, y = (along, across) if self.axis == 0 else (across, along)
            poses.append(Pose(time, x, y, self.radius, self.angle))
        return Thing(self.shape, self.colour, "collide", tuple(poses))


class _Layout:
    """One attempt: the frame's measures and the random draws that depend on them."""

    def __init__(
        self, rng: np.random.Generator, height: int, width: int, num_frames: int, shrink: float, count: int
    ) -> None:
        self.rng = rng
        self.size = (float(width), float(height))
        self.short = float(min(height, width))
        self.num_frames = num_frames
        smallest, largest = RADII[count]
        self.radii = (shrink * self.short * smallest, shrink * self.short * largest)
        self.margin = MARGIN * self.short

    def fill(self, looks: list[Look], motions: list[str]) -> tuple[Thing, ...] | None:
        """All things, or None when one of them finds no place in 25 draws."""
        placed: list[Thing] = []
        while len(placed) < len(looks):
            here = len(placed)
            for _ in range(25):
                if motions[here] == "collide":
                    new = self.colliding_pair(looks[here], looks[here + 1])
                else:
                    new = [self.lone_thing(*looks[here], motions[here])]
                if all(self._apart(a, b) for a in new for b in placed):
                    placed += new
                    break
            else:
                return None
        return tuple(placed)

    def lone_thing(self, colour: str, shape: str, motion: str) -> Thing:
        """A thing that crosses the frame along one axis, or stays and changes its size or its angle."""
        radius = self._radius()
        angle = self._angle(shape)
        if motion in _STEPS:
            start, end = self._crossing(_STEPS[motion], radius)
            poses = (Pose(0.0, *start, radius, angle), Pose(1.0, *end, radius, angle))
            return Thing(shape, colour, motion, poses)
        small, large, turn = radius, radius, 0.0
        if motion == "turn":
            turn = self.rng.uniform(0.9, 2.4) * self.rng.choice((-1, 1))
        else:
            large = self.rng.uniform(0.92, 1.08) * self.radii[1]
            small = self.rng.uniform(0.5, 0.6) * large
        x, y = (self._inside(side, large) for side in self.size)
        first, last = (large, small) if motion == "shrink" else (small, large)
        poses = (Pose(0.0, x, y, first, angle), Pose(1.0, x, y, last, float(angle + turn)))
        return Thing(shape, colour, motion, poses)

    def colliding_pair(self, look_a: Look, look_b: Look) -> list[Thing]:
        """Two things on one level or upright line that meet at a frame near the middle and bounce back."""
        axis = int(self.rng.integers(2))
        # Two things and both their run-ups share one side of the frame, hence the smaller radii.
        low, high = (
            _Collider(*look, side, 0.88 * self._radius(), self._angle(look[1]), axis)
            for look, side in zip((look_a, look_b), self.rng.permutation((-1, 1)), strict=True)
        )
        things = (low, high)
        if low.side > high.side:
            low, high = high, low
        room = self.size[axis] - 2 * self.margin - sum(thing.radius + thing.reach for thing in things)
        run_up = 0.5 * room * self.rng.uniform(0.75, 0.95)
        contact = self.margin + low.radius + low.reach + run_up + self.rng.random() * (room - 2 * run_up)
        across = self._inside(self.size[1 - axis], max(low.radius, high.radius))
        last = self.num_frames - 1
        time = round(self.rng.uniform(0.4, 0.6) * last) / last
        backs = run_up * self.rng.uniform(0.75, 1.0, size=2)
        return [
            thing.bounce(contact, across, ((0.0, run_up), (time, 0.0), (1.0, back)))
            for thing, back in zip(things, backs, strict=True)
        ]

    def _radius(self) -> float:
        return float(self.rng.uniform(*self.radii))

    def _angle(self, shape: str) -> float:
        """Nearly upright: a square on its corner would be called a diamond."""
        return 0.0 if shape == "circle" else float(self.rng.uniform(-0.22, 0.22))

    def _inside(self, side: float, radius: float) -> float:
        return float(self.rng.uniform(radius + self.margin, side - radius - self.margin))

    def _crossing(self, step: tuple[int, int], radius: float) -> tuple[Point, Point]:
        axis = 0 if step[0] else 1
        side = self.size[axis]
        room = side - 2 * (radius + self.margin)
        travel = self.rng.uniform(MIN_TRAVEL * side, min(MAX_TRAVEL * side, room))
        low = radius + self.margin + self.rng.random() * (room - travel)
        across = self._inside(self.size[1 - axis], radius)
        ends = [(low, across), (low + travel, across)]
        ends = [(x, y) if axis == 0 else (y, x) for x, y in ends]
        if sum(step) < 0:
            ends.reverse()
        return ends[0], ends[1]

    def _apart(self, a: Thing, b: Thing) -> bool:
        pose_a, pose_b = a.at(_CHECKED_TIMES), b.at(_CHECKED_TIMES)
        distance = np.hypot(*(pose_a - pose_b)[:, :2].T)
        return bool(np.all(distance > pose_a[:, 2] + pose_b[:, 2] + GAP * self.short))


def _support(shape: str, angle: float, axis: int, sign: int) -> float:
    """How far a shape of bounding radius 1 reaches along `sign` times an axis (0: x, 1: y)."""
    if shape == "circle":
        return 1.0
    # The first corner points up; the square's first corner points up and right so that its sides are level.
    first = angle - math.pi / 2 + (math.pi / 4 if shape == "square" else 0.0)
    corners = [first + 2 * math.pi * k / _NUM_CORNERS[shape] for k in range(_NUM_CORNERS[shape])]
    return max(sign * (math.cos(a), math.sin(a))[axis] for a in corners)
