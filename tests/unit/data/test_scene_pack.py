"""Packing procedural scenes: the clips are the scenes, and the same shards come from any number of workers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vidit.data import scenes
from vidit.data.scene_pack import pack_scenes
from vidit.data.shards import read_clip, read_index
from vidit.data.video import decode_clip


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_clips_are_the_scenes(tmp_path: Path) -> None:
    manifest = pack_scenes(tmp_path / "out", 5, "train", seed=3, workers=0, clips_per_shard=3)
    assert [shard["num_clips"] for shard in manifest["shards"]] == [3, 2]
    data = read_index(tmp_path / "out")
    assert [ref.key for ref in data] == [f"scene-train-{index:07d}" for index in range(5)]
    for index, ref in enumerate(data):
        video, caption, sidecar = read_clip(ref)
        scene = scenes.sample_scene(3, index, "train", num_frames=9, height=64, width=64, fps=8)
        assert caption == scenes.caption(scene)
        assert sidecar["scene"] == json.loads(json.dumps(scene.to_json()))
        assert (ref.num_frames, ref.width, ref.height, ref.fps) == (9, 64, 64, 8)
        decoded = decode_clip(video, num_frames=9, fps=8, height=64, width=64).numpy().astype(int)
        assert np.abs(decoded - scenes.render(scene)).mean() < 6


def test_workers_change_nothing_and_running_again_is_harmless(tmp_path: Path) -> None:
    pack_scenes(tmp_path / "a", 10, "held_out", seed=0, workers=1)
    pack_scenes(tmp_path / "b", 10, "held_out", seed=0, workers=2)
    pack_scenes(tmp_path / "b", 10, "held_out", seed=0, workers=0)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    with pytest.raises(ValueError, match="holds another data set"):
        pack_scenes(tmp_path / "a", 10, "held_out", seed=1, workers=0)


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_clips=0"):
        pack_scenes(tmp_path / "out", 0, "train", seed=0)
    with pytest.raises(ValueError, match="63x64"):
        pack_scenes(tmp_path / "out", 1, "train", seed=0, width=63)
