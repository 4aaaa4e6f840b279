"""Does a trained model draw what the caption says? Scenes drawn, sampled, read back and counted.

Half of the captions hold a (colour, shape) pair that no training clip shows. The ground truth of the same
scenes goes through the same codec and scorer, as the ceiling of what can be measured.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import save

from vidit.data.encode import encode_mp4
from vidit.data.scenes import Scene, Split, caption, render, sample_scene
from vidit.data.video import decode_clip
from vidit.evaluate.scene_score import SceneScore, score_scene
from vidit.sample.run import open_trained
from vidit.train.costs import costed, read_costs
from vidit.whole_file import full_disk_explained, write_whole

ATTRIBUTES = ("colour", "direction", "shape")


@dataclass(frozen=True)
class Judged:
    """One caption, what was drawn for it, and how it was read."""

    caption: str
    seen: bool
    colour: float | None
    direction: float | None
    shape: float | None
    count: bool


def judged_scenes(num: int, seed: int, frames: int, height: int, width: int) -> list[tuple[Scene, bool]]:
    """`num` scenes, (scene, seen): every other one holds a held-out pair. None of them is a training clip."""
    scenes = []
    for index in range(num):
        seen = index % 2 == 0
        split: Split = "train" if seen else "held_out"
        # Training clips are numbered from 0 under the dataset's seed; these use a seed of their own.
        scene = sample_scene(1_000_003 + seed, index, split, num_frames=frames, height=height, width=width)
        scenes.append((scene, seen))
    return scenes


def judge(scene: Scene, seen: bool, video: torch.Tensor) -> Judged:
    """Read a video (T, H, W, 3) uint8 back."""
    score: SceneScore = score_scene(scene, video.numpy())
    return Judged(caption(scene), seen, score.colour, score.direction, score.shape, score.count)


def accuracy(judged: Sequence[Judged], attribute: str) -> float | None:
    """Mean over the captions that name the attribute, None without one; each is the fraction read right."""
    values = [v for j in judged if (v := getattr(j, attribute)) is not None]
    return round(mean(values), 4) if values else None


def evaluate_scenes(run_dir: Path, num_clips: int, seed: int) -> dict[str, Any]:
    """Sample, judge and write RUN/evaluation.json, evaluation.safetensors (videos) and summary.json.

    Returns the summary: colour, direction, shape and count over all captions, the same for the seen and the
    unseen half and for ground truth, and what the run cost.
    """
    with full_disk_explained(run_dir):
        with costed(run_dir, "evaluate") as start:
            trained = open_trained(run_dir)
            start.step = trained.trained_steps
            d = trained.config.data
            scenes = judged_scenes(num_clips, seed, d.num_frames, d.height, d.width)
            videos = trained.draw([caption(scene) for scene, _ in scenes], seed)
            judged = [judge(scene, seen, video) for (scene, seen), video in zip(scenes, videos, strict=True)]
            truth = [judge(scene, seen, _through_codec(scene)) for scene, seen in scenes]
            videos_by_number = save({f"{i:04d}": video for i, video in enumerate(videos)})
            write_whole(run_dir / "evaluation.safetensors", videos_by_number)
            write_whole(run_dir / "evaluation.json", json.dumps([asdict(j) for j in judged], indent=1) + "\n")
        summary = _summary(judged, truth) | _costs(run_dir) | {"captions": num_clips, "steps": trained.trained_steps}
        write_whole(run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def _through_codec(scene: Scene) -> torch.Tensor:
    return decode_clip(
        encode_mp4(render(scene), float(scene.fps)),
        num_frames=scene.num_frames, fps=0.0, height=scene.height, width=scene.width,
    )  # fmt: skip


def _summary(judged: Sequence[Judged], truth: Sequence[Judged]) -> dict[str, Any]:
    def scores(part: Sequence[Judged]) -> dict[str, float | None]:
        return {name: accuracy(part, name) for name in (*ATTRIBUTES, "count")}

    return scores(judged) | {
        "seen": scores([j for j in judged if j.seen]),
        "unseen": scores([j for j in judged if not j.seen]),
        "ground_truth": scores(truth),
    }


def _costs(run_dir: Path) -> dict[str, float]:
    """Seconds of training over every start, and the largest peak memory of any stage."""
    rows = read_costs(run_dir)
    return {
        "train_s": round(sum(r["seconds"] for r in rows if r["stage"] == "train"), 1),
        "evaluate_s": round(sum(r["seconds"] for r in rows if r["stage"] == "evaluate"), 1),
        "peak_rss_gib": round(max(r["peak_rss_gib"] for r in rows), 3),
    }
