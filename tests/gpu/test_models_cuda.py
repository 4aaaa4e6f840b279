"""Every family, U-Net and VAE on a CUDA device gives the outputs and gradients that it gives on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vidit.config import FAMILIES, UNET_FAMILIES, VAE_PRESETS, Model, Unet, Vae
from vidit.model.context import EVERY_FRAME, PADDING, TextContext
from vidit.model.dit import DiT
from vidit.model.init import initialise
from vidit.model.unet.unet import VideoUnet
from vidit.model.windows import Grid
from vidit.vae.autoencoder import CausalVae
from vidit.vae.borrowed import BorrowedVae
from vidit.vae.coding import decode_clip, encode_clip
from vidit.vae.store import load_vae

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("whole_fp32"),
]

GRID, CHANNELS, TEXT, TOKENS = Grid(3, 4, 6), 4, 16, 7
BOUNDS = {torch.float64: 1e-4, torch.bfloat16: 4e-2}  # sines of times and places are fp32
SMALL: dict[str, Any] = {
    "num_layers": 4, "width": 96, "num_heads": 4, "mlp_width": 128, "patch": 1, "time_width": 0, "pooled_width": 0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    name: {**fields, **{k: v for k, v in SMALL.items() if k in Model.model_fields}} for name, fields in FAMILIES.items()
}
MODELS["hunyuanvideo"]["num_single_layers"] = 2
MODELS["gentron"] |= {"cross_text": "interleaved", "text_embedding": "none"}
SMALL_UNET: dict[str, Any] = {
    "channels": 8, "multipliers": (1, 2), "num_res_blocks": 1, "attention": (True, False), "head_dim": 4,
    "norm_groups": 4,
}  # fmt: skip


def stirred(module: nn.Module) -> nn.Module:
    """Nothing that starts at zero hides what comes before it."""
    initialise(module, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.03 * torch.randn(p.shape, generator=generator)
    return module


def texts(device: str, dtype: torch.dtype, two: bool) -> tuple[Tensor, Tensor, TextContext | None]:
    generator = torch.Generator().manual_seed(2)
    frame_BL = torch.full((2, TOKENS), EVERY_FRAME, device=device)
    frame_BL[0, -2:] = PADDING
    first, other = (torch.randn(2, TOKENS, TEXT, generator=generator, dtype=torch.float64) for _ in range(2))
    second = TextContext(other.to(device, dtype), frame_BL) if two else None
    return first.to(device, dtype), frame_BL, second


def denoise(model: nn.Module, device: str, dtype: torch.dtype, times: int, two: bool) -> list[Tensor]:
    """The output, and all gradients in one vector."""
    generator = torch.Generator().manual_seed(1)
    masters = torch.promote_types(dtype, torch.float32)
    x = torch.randn(2, CHANNELS, *GRID.shape, generator=generator, dtype=torch.float64).to(device, masters)
    pooled = torch.randn(2, TEXT, generator=generator, dtype=torch.float64).to(device, masters)
    time = torch.linspace(50, 900, 2 * times, dtype=torch.float64).to(device, masters)
    model.to(device, masters).zero_grad()
    model.dtype = dtype  # type: ignore[assignment]
    text, frame_BL, second = texts(device, masters, two)
    more = {"second": second} if two else {}
    out = model(x, GRID, time.view(2, times) if times > 1 else time, text, frame_BL, pooled_BE=pooled, **more)
    out.double().square().mean().backward()
    grads = [p.grad.double().flatten().cpu() for _, p in model.named_parameters() if p.grad is not None]
    return [out.detach().double().cpu(), torch.cat(grads)]


def assert_agrees(model: nn.Module, dtype: torch.dtype, times: int = 1, two: bool = False) -> None:
    expected = denoise(model, "cpu", torch.float64, times, two)
    for found, right in zip(denoise(model, "cuda", dtype, times, two), expected, strict=True):
        assert (found - right).norm() <= BOUNDS[dtype] * right.norm()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_family(name: str, dtype: torch.dtype) -> None:
    c = Model.model_validate(MODELS[name])
    two = c.cross_text == "interleaved"
    model = stirred(DiT(c, CHANNELS, GRID.shape, TEXT, TEXT if two else 0).double())
    assert_agrees(model, dtype, GRID.frames if c.frame_times else 1, two)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", UNET_FAMILIES)
def test_unet(name: str, dtype: torch.dtype) -> None:
    c = Unet.model_validate({**UNET_FAMILIES[name], **SMALL_UNET})
    assert_agrees(stirred(VideoUnet(c, CHANNELS, GRID.shape, TEXT).double()), dtype)


def narrow(name: str) -> Vae:
    blocks = {
        n: tuple(min(1, k) for k in getattr(Vae.preset(name), n)) for n in ("num_res_blocks", "decoder_res_blocks")
    }
    return Vae.preset(name, **{**blocks, "base_channels": 8, "latent_channels": 4, "norm_groups": 2})


@pytest.mark.parametrize("name", VAE_PRESETS)
def test_vae_in_parts(name: str) -> None:
    """On the device in chunks of frames, on the CPU at once."""
    c = narrow(name)
    vae = CausalVae(c)
    stirred(vae)
    frames, side = 1 + 4 * c.temporal_stride, 2 * c.spatial_stride
    x = torch.randn(1, 3, frames, side, side + c.spatial_stride, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = vae.encode(x).mean
        expected = [z, vae.decode(z)]
    vae.cuda()
    parts = c.model_copy(update={"max_frames": 2 * c.temporal_stride})
    found = [encode_clip(vae, x.cuda(), parts).mean, decode_clip(vae, z.cuda(), parts)]
    for one, right in zip(found, expected, strict=True):
        assert (one.cpu() - right).norm() <= 2e-5 * right.norm()


BORROWED: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {
        "block_out_channels": (8, 8), "norm_num_groups": 2, "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    "AutoencoderKLCogVideoX": {
        "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 2, "latent_channels": 4, "layers_per_block": 1
    },
    "AutoencoderKLHunyuanVideo": {
        "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 2, "latent_channels": 4, "layers_per_block": 1
    },
    "AutoencoderKLWan": {
        "base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "latents_mean": [0.1] * 4,
        "latents_std": [1.5] * 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", BORROWED)
def test_borrowed_vae(kind: str, tmp_path: Any) -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    getattr(diffusers, kind)(**BORROWED[kind]).save_pretrained(tmp_path)
    vaes = [load_vae(tmp_path, torch.device(device), torch.float32) for device in ("cpu", "cuda")]
    assert all(isinstance(vae, BorrowedVae) for vae in vaes)
    x = torch.randn(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = vaes[0].encode(x).mean
        right, (found_z, found) = vaes[0].decode(z), (vaes[1].encode(x.cuda()).mean, vaes[1].decode(z.cuda()))
    assert (found_z.cpu() - z).norm() <= 1e-5 * z.norm()
    assert (found.cpu() - right).norm() <= 1e-5 * right.norm()
