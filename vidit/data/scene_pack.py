"""A data set of procedural scenes: rendered, encoded, written into shards, a pure function of the arguments."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vidit.data import scenes
from vidit.data.encode import encode_mp4
from vidit.data.manifest import MANIFEST
from vidit.data.shard_writer import ShardWriter
from vidit.data.staging import staged
from vidit.data.workers import mapped


def pack_scenes(
    out: Path,
    num_clips: int,
    split: scenes.Split,
    seed: int,
    num_frames: int = 9,
    height: int = 64,
    width: int = 64,
    fps: int = 8,
    count_odds: Sequence[float] = scenes.COUNT_ODDS,
    workers: int = 2,
    clips_per_shard: int = 1000,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Render, encode and write procedural clips (``vidit.data.scenes``); returns the manifest.

    Clip i is scene (seed, i, split), under the key ``scene-<split>-<i as 7 digits>``. ``workers`` processes
    render (0 or 1: this one does). Raises ValueError for wrong arguments or an ``out`` with other content.
    """
    if not 1 <= num_clips <= 10_000_000:
        raise ValueError(f"num_clips={num_clips} is outside 1 to 10000000")
    if height % 2 or width % 2:
        raise ValueError(f"{width}x{height} pixels cannot be stored; H.264 needs an even width and height")
    make = functools.partial(
        _scene_clip,
        seed=seed,
        split=split,
        num_frames=num_frames,
        height=height,
        width=width,
        fps=fps,
        count_odds=tuple(count_odds),
    )
    with staged(out, overwrite) as stage:
        with ShardWriter(stage.folder, clips_per_shard) as writer:
            for key, video, sidecar in mapped(make, range(num_clips), workers):
                writer.add(key, video, sidecar)
        stage.publish()
        manifest: dict[str, Any] = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def _scene_clip(
    index: int,
    seed: int,
    split: scenes.Split,
    num_frames: int,
    height: int,
    width: int,
    fps: int,
    count_odds: tuple[float, ...],
) -> tuple[str, bytes, dict[str, Any]]:
    scene = scenes.sample_scene(seed, index, split, num_frames, height, width, fps, count_odds)
    sidecar = {
        "caption": scenes.caption(scene),
        "fps": fps,
        "num_frames": num_frames,
        "width": width,
        "height": height,
        "scene": scene.to_json(),
    }
    return f"scene-{split}-{index:07d}", encode_mp4(scenes.render(scene), fps), sidecar
