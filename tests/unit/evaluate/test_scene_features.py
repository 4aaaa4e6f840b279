"""The network whose weights come with the project: its distance and its features of videos."""

from __future__ import annotations

from pathlib import Path

import torch

from vidit.data.scenes import render, sample_scene
from vidit.vae.perceptual import SceneFeatures, load_perceptual

ROOT = Path(__file__).parents[3]


def test_the_projects_features_grow_with_the_damage() -> None:
    network = load_perceptual("features", [ROOT / "configs/weights/scene_features/model.safetensors"])
    assert isinstance(network, SceneFeatures)
    video = torch.from_numpy(render(sample_scene(9, 1, "train", 5))).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(1))
    distances = [float(network(video, video + size * noise)) for size in (0.0, 0.02, 0.1, 0.3)]
    assert distances[0] == 0
    assert distances == sorted(set(distances))
    still = video[:, :, :1].expand_as(video)
    features = network.video_features(torch.cat((video, still)))
    assert features.shape == (2, 128)
    assert not features[1, 64:].any(), "nothing changes in a still"
    assert bool(features[0, 64:].any())
    assert network.video_features(video[:, :, :1]).shape == (1, 128)
