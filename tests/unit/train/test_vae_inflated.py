"""A run of a VAE that begins with one of images of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vidit.config import RunConfig
from vidit.train.run import run
from vidit.vae.store import load_vae

AutoencoderKL: Any = pytest.importorskip("diffusers").AutoencoderKL


@torch.no_grad()
def test_the_first_frame_stays_the_images(configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    """A run that learns nothing has written a VAE of videos that codes an image as the class, from a pipeline's folder;
    with the encoder frozen, one that learns keeps encoder and statistics.
    """
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    geometry = {
        "layers": "ldm", "mid_attention": True, "norm": "group", "norm_groups": 4, "latent_channels": 4, "patch": 1,
        "base_channels": 8, "multipliers": (1, 2), "num_res_blocks": (1, 3), "decoder_res_blocks": (2, 4),
        "spatial_down": (True,), "temporal_down": (True,),
    }  # fmt: skip
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    z = model.encode(x).latent_dist.mean
    for name, rate, frozen in (("still", 1e-30, False), ("learning", 1e-2, True)):
        begun = {"init": str(tmp_path / "pipeline"), "inflate": True, "freeze_encoder": frozen}
        train = {"task": "vae", "steps": 1, "learning_rate": rate, "precision": "fp32"}
        config = configure(tmp_path / name, vae=geometry, vae_train=begun, train=train)
        with torch.enable_grad():
            assert run(config)
        vae = load_vae(config.directory / "vae", torch.device("cpu"), torch.float32)
        torch.testing.assert_close(vae.encode(x[:, :, None]).mean[:, :, 0], z, rtol=1e-5, atol=1e-6)
        pixels, wanted = vae.decode(z[:, :, None])[:, :, 0], model.decode(z).sample
        assert torch.allclose(pixels, wanted, rtol=1e-5, atol=1e-5) == (not frozen)
        if frozen:
            assert torch.allclose(vae.latent_std, torch.tensor(1 / 0.18215))
