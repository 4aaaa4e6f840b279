"""The end of a VAE run: statistics of training clips, however few are validated, and a folder that is whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vidit.config import RunConfig
from vidit.data.catalog import Catalog
from vidit.data.loader import MicroBatches
from vidit.data.shards import read_index
from vidit.train import run as training
from vidit.train.run import run
from vidit.train.step import to_pixels
from vidit.vae.store import load_vae

Configure = Callable[..., RunConfig]


@pytest.mark.parametrize("num_validation", [0, 1, 4])
def test_statistics_are_of_all_training_clips(
    configure: Configure, tmp_path: Path, num_validation: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(tmp_path, train={"task": "vae", "steps": 1}, data={"num_validation": num_validation})
    assert run(config)
    num = 16 - num_validation
    assert f"latent mean and std over {num} training clips" in capsys.readouterr().out
    vae = load_vae(tmp_path / "vae", torch.device("cpu"), torch.float32)
    clips = MicroBatches(config, Catalog.plain(read_index(config.data.train)[:num]), None, 1)
    pixels = torch.stack([clips.decode(ref)[0] for ref in clips.refs])
    with torch.no_grad():
        z = vae.encode(to_pixels(pixels, torch.device("cpu"))).mean.transpose(0, 1).flatten(1)
    torch.testing.assert_close(vae.latent_mean, z.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.latent_std, z.std(1), rtol=1e-4, atol=1e-5)
    assert {path.name for path in (tmp_path / "vae").iterdir()} == {"config.json", "model.safetensors"}


def test_a_large_dataset_is_not_read_to_its_end(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "NUM_CLIPS", 5)
    assert run(configure(tmp_path, train={"task": "vae", "steps": 1}, data={"num_validation": 0}))
    assert "over 5 training clips" in capsys.readouterr().out
