"""Train the small network whose features stand in for VGG16's where LPIPS has no weights, and say what it can do.

    python -m benchmarks.features configs/weights/scene_features

It learns to name, of one frame of a procedural scene, which colours show which shapes, and the background's texture.
Writes `model.safetensors` (fp16, without the heads) and `record.json`: how often it is right on scenes that it has not
seen, and how its distance grows with blur, noise and shift.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from vidit.data.scenes import COLOURS, SHAPES, TEXTURES, Scene, render, sample_scene
from vidit.train.rundir import environment
from vidit.vae.perceptual import SCENE_WIDTHS, SceneFeatures
from vidit.whole_file import write_whole

PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
SEED, NUM_SCENES, NUM_UNSEEN, FRAMES = 5, 6000, 512, 3
STEPS, ROWS, RATE = 3000, 64, 3e-3


def frames_of(first: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Frames (N, 3, H, W) in [-1, 1], pairs of colour and shape that each shows (N, 24), textures (N,)."""
    scenes = [sample_scene(SEED, first + i, "held_out" if i % 2 else "train", FRAMES) for i in range(number)]
    pixels = torch.from_numpy(np.concatenate([render(scene) for scene in scenes])).permute(0, 3, 1, 2)
    shown = torch.tensor([_shown(scene) for scene in scenes]).repeat_interleave(FRAMES, 0)
    textures = torch.tensor([TEXTURES.index(scene.background.texture) for scene in scenes]).repeat_interleave(FRAMES)
    return pixels.contiguous(), shown, textures


def _shown(scene: Scene) -> list[float]:
    things = {(thing.colour, thing.shape) for thing in scene.things}
    return [float(pair in things) for pair in PAIRS]


def to_signed(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


class Reader(nn.Module):
    """The features, and heads that are thrown away: a pair may be anywhere, so its strongest place counts."""

    def __init__(self) -> None:
        super().__init__()
        self.features = SceneFeatures()
        self.pairs = nn.Conv2d(SCENE_WIDTHS[-1], len(PAIRS), 1)
        self.textures = nn.Linear(SCENE_WIDTHS[-1], len(TEXTURES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        last = self.features.stages(x)[-1]
        return self.pairs(last).amax((2, 3)), self.textures(last.mean((2, 3)))


def trained(steps: int, num_scenes: int) -> Reader:
    """A reader after `steps` steps of Adam."""
    torch.manual_seed(SEED)
    reader = Reader()
    optimizer = torch.optim.Adam(reader.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    pixels, shown, textures = frames_of(0, num_scenes)
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(steps):
        rows = torch.randint(len(pixels), (ROWS,), generator=generator)
        x = to_signed(pixels[rows])
        # What looks alike after noise and blur has to be told apart by them.
        x = x + 0.1 * torch.rand((), generator=generator) * torch.randn(x.shape, generator=generator)
        pairs, backgrounds = reader(x)
        loss = F.binary_cross_entropy_with_logits(pairs, shown[rows]) + 0.2 * F.cross_entropy(
            backgrounds, textures[rows]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return reader


@torch.no_grad()
def judged(reader: Reader, first: int, number: int) -> dict[str, Any]:
    """How often it is right, and what it takes for how far."""
    pixels, shown, textures = frames_of(first, number)
    x = to_signed(pixels)
    pairs, backgrounds = (torch.cat(part) for part in zip(*map(reader, x.split(64)), strict=True))
    there = pairs > 0
    some = x[:96, :, None]
    blurred = F.avg_pool2d(some[:, :, 0], 3, 1, 1)[:, :, None]
    noise = torch.randn(some.shape, generator=torch.Generator().manual_seed(SEED))
    changed = {
        "blur": blurred, "noise 0.02": some + 0.02 * noise, "noise 0.1": some + 0.1 * noise,
        "shift by 1": some.roll(1, -1), "another": some.roll(3, 0),
    }  # fmt: skip
    return {
        "pairs_right": float((there == shown.bool()).float().mean()),
        "pairs_recall": float(there[shown.bool()].float().mean()),
        "pairs_precision": float(shown[there].mean()),
        "textures_right": float((backgrounds.argmax(1) == textures).float().mean()),
        "distance": {name: float(reader.features(some, other).mean()) for name, other in changed.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--scenes", type=int, default=NUM_SCENES)
    arguments = parser.parse_args()
    start = time.perf_counter()
    reader = trained(arguments.steps, arguments.scenes)
    seconds = time.perf_counter() - start
    half = {name: tensor.half() for name, tensor in reader.features.state_dict().items()}
    reader.features.load_state_dict({name: tensor.float() for name, tensor in half.items()})
    record = judged(reader, arguments.scenes, NUM_UNSEEN) | {
        "steps": arguments.steps, "scenes": arguments.scenes, "train_s": round(seconds, 1),
        "environment": environment(),
    }  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_whole(arguments.out / "model.safetensors", save(half))
    write_whole(arguments.out / "record.json", json.dumps(record, indent=1) + "\n")
    print(json.dumps({name: value for name, value in record.items() if name != "environment"}, indent=1))


if __name__ == "__main__":
    main()
