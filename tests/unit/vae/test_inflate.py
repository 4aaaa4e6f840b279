"""A VAE that starts from another: an image is coded as there, and what does not fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vidit.config import Vae
from vidit.model.init import initialise
from vidit.vae.autoencoder import CausalVae
from vidit.vae.inflate import starting_weights
from vidit.vae.store import save_vae

GEOMETRIES: dict[str, dict[str, Any]] = {
    "two joints": {
        "latent_channels": 4, "patch": 2, "base_channels": 8, "multipliers": (1, 2, 4), "num_res_blocks": (1, 1, 1),
        "decoder_res_blocks": (1, 0, 1), "spatial_down": (True, True), "temporal_down": (True, True),
    },
    "equal widths, group norm": {
        "latent_channels": 2, "base_channels": 8, "multipliers": (1, 1, 2), "num_res_blocks": (1, 1, 0),
        "decoder_res_blocks": (1, 1, 1), "spatial_down": (True, True), "temporal_down": (False, True), "norm": "group",
        "norm_groups": 4,
    },
}  # fmt: skip


def stored(folder: Path, geometry: dict[str, Any]) -> CausalVae:
    vae = CausalVae(Vae(**geometry))
    initialise(vae, 3)
    with torch.no_grad():
        for name, p in vae.named_parameters():
            if name.endswith("bias"):  # they start at zero, which would hide them
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    vae.latent_mean.fill_(0.3)
    save_vae(folder, vae)
    return vae


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@torch.no_grad()
def test_an_image_is_coded_as_by_the_image_vae(geometry: dict[str, Any], tmp_path: Path) -> None:
    image_vae = stored(tmp_path, {**geometry, "temporal_down": (False, False)})
    c = Vae(**geometry)
    vae = CausalVae(c)
    vae.load_state_dict(starting_weights(c, tmp_path, inflate=True))
    x = torch.randn(2, 3, 9, 32, 32, generator=torch.Generator().manual_seed(4))
    image = x[:, :, :1]
    z = image_vae.encode(image)
    torch.testing.assert_close(vae.encode(image), z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(z.mean), image_vae.decode(z.mean), rtol=1e-4, atol=1e-5)
    video = vae.encode(x)
    torch.testing.assert_close(video.mean[:, :, :1], z.mean, rtol=1e-4, atol=1e-5)
    assert vae.decode(video.mean).shape == x.shape
    assert float(vae.latent_mean[0]) == pytest.approx(0.3)


@torch.no_grad()
def test_the_same_geometry_goes_on_bit_for_bit(tmp_path: Path) -> None:
    vae = stored(tmp_path, GEOMETRIES["two joints"])
    c = Vae(**GEOMETRIES["two joints"], l1_weight=0.5, weights="elsewhere")
    found = starting_weights(c, tmp_path, inflate=False)
    assert all(torch.equal(found[name], tensor) for name, tensor in vae.state_dict().items())


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    geometry = GEOMETRIES["two joints"]
    stored(tmp_path / "video", geometry)
    stored(tmp_path / "image", {**geometry, "temporal_down": (False, False)})
    c = Vae(**geometry)
    with pytest.raises(ValueError, match=r"set vae_train\.inflate=true"):
        starting_weights(c, tmp_path / "image", inflate=False)
    with pytest.raises(ValueError, match="strides over 4 frames, and an image VAE over none"):
        starting_weights(c, tmp_path / "video", inflate=True)
    with pytest.raises(ValueError, match=r"vae\.base_channels=16, there 8"):
        starting_weights(Vae(**{**geometry, "base_channels": 16}), tmp_path / "image", inflate=True)
    with pytest.raises(ValueError, match=r"^vae_train\.init=.*none holds no config\.json; .* or diffusers$"):
        starting_weights(c, tmp_path / "none", inflate=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "AutoencoderDC"}')
    with pytest.raises(ValueError, match=r"is of class 'AutoencoderDC'; as vae_train\.init use one of AutoencoderKL$"):
        starting_weights(c, tmp_path / "other", inflate=False)
