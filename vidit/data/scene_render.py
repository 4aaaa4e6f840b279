"""Draws a scene: antialiased shapes by signed distance over a textured background.

Why signed distances: one formula gives an edge that is exactly one pixel wide at any size and angle, so that
slow motion is smooth at 64x64 pixels (Quilez, "2D distance functions", gives the formulas for the polygons).
Backgrounds are sums and products of functions of x and of y, so a drifting texture costs two small tables.
"""

import math

import numpy as np

from vidit.data.scene_types import COLOURS, Background, Scene, Thing, keyed_generator

STAR_INNER = 0.44  # radius of the star's inner corners: a touch fatter than a pentagram, to survive 64x64


def render(scene: Scene) -> np.ndarray:
    """The clip of a scene: uint8 (T, H, W, 3), RGB."""
    frames = _draw_background(scene)
    for thing in scene.things:
        _draw_thing(frames, thing, scene.times)
    return (frames + 0.5).astype(np.uint8)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray | float) -> np.ndarray:
    """Distance to the edge of an upright shape of this radius around (0, 0), y down; negative inside."""
    if shape == "circle":
        return _circle(x, y, radius)
    if shape == "square":
        return _square(x, y, radius * math.sqrt(0.5))
    if shape == "triangle":
        return _triangle(x, -y, radius * (math.sqrt(3) / 2))
    if shape == "star":
        return _star(x, -y, radius)
    raise ValueError(f"no shape is called {shape!r}; use circle, square, triangle or star")


def coverage(
    shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray | float, angle: np.ndarray | float
) -> np.ndarray:
    """How much of the unit pixel centred at (x, y) a shape covers, 0..1; the arguments broadcast."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.clip(0.5 - signed_distance(shape, cos * x + sin * y, cos * y - sin * x, radius), 0, 1)


def _circle(x: np.ndarray, y: np.ndarray, radius: np.ndarray | float) -> np.ndarray:
    distance: np.ndarray = np.hypot(x, y) - radius
    return distance


def _square(x: np.ndarray, y: np.ndarray, half: np.ndarray | float) -> np.ndarray:
    x, y = np.abs(x) - half, np.abs(y) - half
    outside: np.ndarray = np.hypot(np.maximum(x, 0), np.maximum(y, 0))
    distance: np.ndarray = outside + np.minimum(np.maximum(x, y), 0)
    return distance


def _triangle(x: np.ndarray, y: np.ndarray, half: np.ndarray | float) -> np.ndarray:
    """Equilateral, y up, `half` a side."""
    root = math.sqrt(3)
    x, y = np.abs(x) - half, y + half / root
    fold = x + root * y > 0
    x, y = np.where(fold, (x - root * y) / 2, x), np.where(fold, (-root * x - y) / 2, y)
    x = x - np.clip(x, -2 * half, 0)
    distance: np.ndarray = -np.hypot(x, y) * np.sign(y)
    return distance


def _star(x: np.ndarray, y: np.ndarray, radius: np.ndarray | float) -> np.ndarray:
    """Five points, y up: folded onto the half of one point, where the edge is one straight line."""
    cos, sin = math.cos(math.pi / 5), math.sin(math.pi / 5)
    x = np.abs(x)
    for side in (cos, -cos):
        past = 2 * np.maximum(side * x - sin * y, 0)
        x, y = x - past * side, y + past * sin
    x, y = np.abs(x), y - radius
    edge_x, edge_y = STAR_INNER * sin, STAR_INNER * cos - 1
    along = np.clip((x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2), 0, radius)
    return np.hypot(x - edge_x * along, y - edge_y * along) * np.sign(y * edge_x - x * edge_y)


def _draw_thing(frames: np.ndarray, thing: Thing, times: np.ndarray) -> None:
    """Blends a thing into float32 (T, H, W, 3) in place, touching only a patch of each frame."""
    x, y, radius, angle = (column.astype(np.float32)[:, None, None] for column in thing.at(times).T)
    height, width = frames.shape[1:3]
    patch = math.ceil(2 * float(radius.max())) + 3
    left = np.floor(x - patch / 2).clip(0, max(width - patch, 0))
    top = np.floor(y - patch / 2).clip(0, max(height - patch, 0))
    offsets = np.arange(patch, dtype=np.float32) + 0.5
    alpha = coverage(thing.shape, left + offsets - x, top + offsets[:, None] - y, radius, angle)[..., None]
    colour = np.array(COLOURS[thing.colour], dtype=np.float32)
    corners = np.stack([top.ravel(), left.ravel()], axis=-1).astype(int)
    for frame, alpha_HW1, (row, column) in zip(frames, alpha, corners, strict=True):
        window = frame[row : row + patch, column : column + patch]
        window += alpha_HW1[: window.shape[0], : window.shape[1]] * (colour - window)


def _draw_background(scene: Scene) -> np.ndarray:
    """float32 (T, H, W, 3)."""
    ground = scene.background
    x = np.arange(scene.width, dtype=np.float32) + 0.5
    y = np.arange(scene.height, dtype=np.float32) + 0.5
    moves = any(ground.drift) and ground.texture not in ("plain", "gradient")
    times = scene.times.astype(np.float32)[:, None] if moves else np.zeros((1, 1), np.float32)
    mix = _texture(ground, x - times * ground.drift[0], y - times * ground.drift[1], scene.seed)
    dark, light = (np.array(colour, dtype=np.float32) for colour in (ground.dark, ground.light))
    one = dark + mix[..., None] * (light - dark)
    return one if len(one) == scene.num_frames else np.repeat(one, scene.num_frames, axis=0)


def _texture(ground: Background, x: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    """(N, W) and (N, H) positions -> (N, H, W) in 0..1, where 0 is the dark grey and 1 the light one."""
    cos, sin = math.cos(ground.angle), math.sin(ground.angle)
    wave = 2 * math.pi / ground.period
    # A sine of this slope, clipped, is a square wave whose edges are about a pixel wide.
    sharp = ground.period / (2 * math.pi)
    if ground.texture == "striped":
        phase = (wave * cos * x)[:, None, :] + (wave * sin * y)[:, :, None]
        return np.clip(0.5 + sharp * np.sin(phase), 0, 1)
    if ground.texture == "checked":
        across, down = (np.clip(sharp * np.sin(wave / 2 * axis), -0.5, 0.5) for axis in (x, y))
        return 0.5 + 2 * across[:, None, :] * down[:, :, None]
    if ground.texture == "dotted":
        across, down = ((axis / ground.period) % 1 - 0.5 for axis in (x, y))
        distance = np.sqrt((across**2)[:, None, :] + (down**2)[:, :, None])
        return np.clip(0.5 + (0.27 - distance) * ground.period, 0, 1)
    if ground.texture == "cloudy":
        return _clouds(x, y, ground.period, seed)
    if ground.texture == "gradient":
        across, down = cos * (2 * x / x.shape[1] - 1), sin * (2 * y / y.shape[1] - 1)
        ramp: np.ndarray = (across[:, None, :] + down[:, :, None]) / (2 * (abs(cos) + abs(sin)))
        return 0.5 + ramp
    return np.full((len(x), y.shape[1], x.shape[1]), 0.5, dtype=np.float32)


def _clouds(x: np.ndarray, y: np.ndarray, period: float, seed: int) -> np.ndarray:
    """Smooth noise: ten plane waves of random direction and wavelength, as one product of two tables."""
    rng = keyed_generator("clouds", seed)
    angle, phase = rng.uniform(0, 2 * math.pi, size=(2, 10)).astype(np.float32)
    wavelength = (period * rng.uniform(1.2, 4.0, size=10)).astype(np.float32)
    turn_x = x[..., None] * (2 * math.pi * np.cos(angle) / wavelength) + phase
    turn_y = y[..., None] * (2 * math.pi * np.sin(angle) / wavelength)
    # cos(a + b) = cos a cos b - sin a sin b separates each wave into a column and a row.
    rows = np.concatenate([np.cos(turn_y), -np.sin(turn_y)], axis=-1)
    columns = np.concatenate([np.cos(turn_x), np.sin(turn_x)], axis=-1)
    total: np.ndarray = rows @ columns.transpose(0, 2, 1)
    return (0.5 + 0.15 * total).clip(0, 1)
