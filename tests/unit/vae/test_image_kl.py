"""A VAE of images of diffusers becomes one of this project: images are coded as there, and videos go on from there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vidit.config import Vae
from vidit.vae.autoencoder import CausalVae
from vidit.vae.image_kl import DEFAULTS, image_geometry
from vidit.vae.inflate import starting_weights

AutoencoderKL: Any = pytest.importorskip("diffusers").AutoencoderKL

FILE = "diffusion_pytorch_model.safetensors"


def sizes(*widths: int, **more: Any) -> dict[str, Any]:
    return {
        "block_out_channels": widths, "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths), "norm_num_groups": 4, **more,
    }  # fmt: skip


# Of the class; then ours, over time besides.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Stable Diffusion's": (
        sizes(8, 16, 32, 32, layers_per_block=2, scaling_factor=0.13025),
        {"multipliers": (1, 2, 4, 4), "num_res_blocks": (2, 2, 2, 4), "decoder_res_blocks": (3, 3, 3, 5),
         "spatial_down": (True,) * 3, "temporal_down": (False, True, True), "latent_channels": 4},
    ),
    "no matrices around the latent, shifted": (
        sizes(8, 8, latent_channels=5, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        {"multipliers": (1, 1), "num_res_blocks": (1, 3), "decoder_res_blocks": (2, 4), "spatial_down": (True,),
         "temporal_down": (True,), "latent_channels": 5},
    ),
    "no attention, one level": (
        sizes(8, mid_block_add_attention=False),
        {"multipliers": (1,), "num_res_blocks": (3,), "decoder_res_blocks": (4,), "spatial_down": (),
         "temporal_down": (), "latent_channels": 4, "mid_attention": False},
    ),
}  # fmt: skip


def ours(changes: dict[str, Any]) -> Vae:
    c = Vae(**{"layers": "ldm", "mid_attention": True, "norm": "group", "norm_groups": 4, "base_channels": 8} | changes)
    assert list(c.faults()) == []
    return c


@torch.no_grad()
def stored(folder: Path, geometry: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = AutoencoderKL(**geometry).eval()
    for name, p in model.named_parameters():
        p.copy_(torch.randn_like(p) / p[0].numel() ** 0.5 + float("norm" in name and name.endswith("weight")))
    model.save_pretrained(folder)
    return model


def close(found: Tensor, wanted: Tensor) -> None:
    assert float((found - wanted).detach().abs().max()) <= 1e-5 * float(wanted.detach().abs().max())


@pytest.mark.parametrize(("geometry", "changes"), CASES.values(), ids=CASES)
def test_an_image_is_coded_as_by_the_class(geometry: dict[str, Any], changes: dict[str, Any], tmp_path: Path) -> None:
    """Alone and as the first frame of a video; encoder, decoder, and the gradient by what goes in."""
    model, c = stored(tmp_path, geometry), ours(changes)
    vae = CausalVae(c)
    vae.load_state_dict(starting_weights(c, tmp_path, inflate=True))
    s, frames = c.spatial_stride, 1 + 2 * c.temporal_stride
    x = torch.randn(2, 3, frames, 5 * s, 3 * s, generator=torch.Generator().manual_seed(1))
    image, flat = x[:, :, :1].clone().requires_grad_(), x[:, :, 0].clone().requires_grad_()
    found, wanted = vae.encode(image), model.encode(flat).latent_dist
    close(found.mean[:, :, 0], wanted.mean)
    close(found.log_variance[:, :, 0], wanted.logvar)
    z = wanted.mean.detach().clone().requires_grad_()
    own = z.detach()[:, :, None].clone().requires_grad_()
    pixels, theirs = vae.decode(own)[:, :, 0], model.decode(z).sample
    close(pixels, theirs)
    for value in (found.mean, wanted.mean, pixels, theirs):
        value.square().sum().backward()
    for one, other in ((image.grad, flat.grad), (own.grad, z.grad)):
        assert one is not None
        assert other is not None
        close(one[:, :, 0], other)
    with torch.no_grad():
        video = vae.encode(x)
        close(video.mean[:, :, 0], wanted.mean)
        assert vae.decode(video.mean).shape == x.shape
        assert c.temporal_stride == 1 or video.mean.shape[2] < frames
        whitened = (wanted.mean - geometry.get("shift_factor", 0.0)) * model.config.scaling_factor
        close(vae.whiten(found.mean)[:, :, 0], whitened)


@torch.no_grad()
def test_without_time_it_goes_on_as_the_class_for_every_frame(tmp_path: Path) -> None:
    geometry, changes = CASES["no matrices around the latent, shifted"]
    model, c = stored(tmp_path, geometry), ours({**changes, "temporal_down": (False,)})
    vae = CausalVae(c)
    vae.load_state_dict(starting_weights(c, tmp_path, inflate=False))
    x = torch.randn(1, 3, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    for frame in range(3):
        close(vae.encode(x).mean[:, :, frame], model.encode(x[:, :, frame]).latent_dist.mean)


def test_older_names_and_what_does_not_fit(tmp_path: Path) -> None:
    geometry, changes = CASES["Stable Diffusion's"]
    stored(tmp_path, geometry)
    c, path = ours(changes), tmp_path / FILE
    wanted, tensors = starting_weights(c, tmp_path, inflate=True), load_file(path)
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = dict(tensors)
    for newer, name in older.items():
        for key in [key for key in renamed if f".attentions.0.{newer}." in key]:
            tensor = renamed.pop(key)
            # As Stable Diffusion's own checkpoints have them: pointwise kernels.
            renamed[key.replace(newer, name)] = tensor[:, :, None, None] if key.endswith("weight") else tensor
    save_file({name: tensor.contiguous() for name, tensor in renamed.items()}, path)
    found = starting_weights(c, tmp_path, inflate=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    lost = tensors.pop("decoder.up_blocks.1.resnets.0.conv1.weight")
    save_file(tensors | {"decoder.up_blocks.9.conv.weight": lost}, path)
    told = "1 missing: decoder.up_blocks.1.resnets.0.conv1.weight; 1 unknown: decoder.up_blocks.9.conv.weight"
    with pytest.raises(ValueError, match=re.escape(told)):
        starting_weights(c, tmp_path, inflate=True)
    save_file(tensors | {"decoder.up_blocks.1.resnets.0.conv1.weight": lost[:, :-1].contiguous()}, path)
    with pytest.raises(ValueError, match=r"conv1\.weight of .* is \(32, 31, 3, 3\), and \(32, 32, 3, 3\) by"):
        starting_weights(c, tmp_path, inflate=True)


def test_another_geometry_is_named(tmp_path: Path) -> None:
    geometry, changes = CASES["Stable Diffusion's"]
    stored(tmp_path, geometry)
    with pytest.raises(ValueError, match=r"set vae_train\.inflate=true, or give them alike"):
        starting_weights(ours(changes), tmp_path, inflate=False)
    with pytest.raises(ValueError, match=r"vae\.layers='residual', there 'ldm'; vae\.mid_attention=False, there True"):
        starting_weights(ours({**changes, "layers": "residual", "mid_attention": False}), tmp_path, inflate=True)
    path = tmp_path / "config.json"
    facts = json.loads(path.read_text())
    path.write_text(
        json.dumps({**facts, "up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"], "act_fn": "gelu"})
    )
    with pytest.raises(
        ValueError, match=r"up_block_types=.*AttnUp.* and act_fn=gelu; a VAE here has DownEncoderBlock2D"
    ):
        starting_weights(ours(changes), tmp_path, inflate=True)
    path.write_text(json.dumps({name: value for name, value in facts.items() if name != "down_block_types"}))
    with pytest.raises(ValueError, match=r"lacks 'down_block_types'; copy the file again"):
        starting_weights(ours(changes), tmp_path, inflate=True)
    path.write_text(
        json.dumps(
            {
                "_class_name": "AutoencoderKLCogVideoX",
                **{k: facts[k] for k in ("latent_channels", "block_out_channels")},
            }
        )
    )
    with pytest.raises(ValueError, match=r"is an AutoencoderKLCogVideoX; of diffusers only AutoencoderKL"):
        starting_weights(ours(changes), tmp_path, inflate=True)


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("block_out_channels", "8", "a list of whole numbers above 0"),
        ("block_out_channels", [], "a list of whole numbers above 0"),
        ("down_block_types", None, "a list of names"),
        ("latent_channels", "4", "a whole number above 0"),
        ("scaling_factor", None, "a number above 0"),
        ("mid_block_add_attention", None, "true or false"),
    ],
)
def test_a_damaged_config_is_told_by_its_field(name: str, value: Any, what: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"")
    facts = {"_class_name": "AutoencoderKL", **sizes(8), "latent_channels": 4, name: value}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    told = re.escape(f"config.json of AutoencoderKL has {name}={value!r}, and it is {what}; copy the file again")
    with pytest.raises(ValueError, match=told):
        starting_weights(Vae(), tmp_path, inflate=True)


def test_the_preset_is_the_published_geometry(tmp_path: Path) -> None:
    facts = {**DEFAULTS, **sizes(128, 256, 512, 512, layers_per_block=2, norm_num_groups=32, latent_channels=4)}
    assert image_geometry(tmp_path, facts) == Vae.preset("stable-diffusion", temporal_down=(False,) * 3)


def test_layers_that_contradict_themselves() -> None:
    def told(**changes: Any) -> str:
        return "; ".join(Vae.preset("stable-diffusion", **changes).faults())

    assert told() == ""
    assert "vae.norm=rms with vae.layers=ldm" in told(norm="rms")
    assert "a level's first block changes the width; give each level at least 1" in told(num_res_blocks=(1, 0, 1, 1))
    assert "which has none; give it at least 1" in told(layers="residual", decoder_res_blocks=(1, 1, 1, 0))
    assert "no overlap makes it exact" in told(layers="residual", norm="rms", tile=64)
