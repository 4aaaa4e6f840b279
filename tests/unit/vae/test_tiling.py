"""Tiles with the overlap of the receptive field are exact; with less the difference falls with the overlap."""

import pytest
import torch

from tests.unit.vae.test_streaming import build, narrow, video
from vidit.config import VAE_PRESETS, Vae
from vidit.vae.coding import decode_clip, encode_clip, open_encoder
from vidit.vae.receptive import decoder_margin, encoder_margin
from vidit.vae.tiling import Grid


@pytest.mark.parametrize("preset", [name for name in VAE_PRESETS if not Vae.preset(name).mid_attention])
def test_margins_cover_what_a_latent_depends_on(preset):
    """By the gradient: no place outside the margin counts, and one at its rim does."""
    c = narrow(preset, norm="rms")
    vae = build(c)
    for margin, code, x in (
        (encoder_margin(c), lambda x: vae.encode(x).mean, video(c, 1, 1, 2 * encoder_margin(c) + 3)),
        (decoder_margin(c), vae.decode, torch.randn(1, 4, 1, 1, 2 * decoder_margin(c) + 3)),
    ):
        x.requires_grad_()
        latents, out = 2 * margin + 3, code(x)
        places = out.shape[-1] // latents
        middle = latents // 2
        out[..., middle * places : (middle + 1) * places].square().sum().backward()
        moved = x.grad.abs().flatten(0, -2).amax(0).unflatten(0, (latents, -1)).amax(1) > 0
        reach = max(abs(int(n) - middle) for n in moved.nonzero())
        assert reach <= margin
        assert reach >= margin - 1, "the margin is wider than it must be"


@pytest.mark.parametrize("preset", ["walt", "wavelet", "4x16x16"])
@torch.no_grad()
def test_tiles_are_exact_with_what_they_depend_on(preset):
    c = narrow(preset, max_frames=8)
    c = c.model_copy(update={"tile": 2 * c.spatial_stride})
    vae, x = build(c), video(c, 3, 5, 7)
    z = vae.encode(x).mean
    torch.testing.assert_close(encode_clip(vae, x, c).mean, z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decode_clip(vae, z, c), vae.decode(z), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["rms", "group"])
@torch.no_grad()
def test_the_difference_falls_with_the_overlap(norm):
    c = narrow("walt", norm=norm, tile=64)
    vae, x = build(c), video(c, 1, 16, 16)
    z = vae.encode(x).mean
    pixels = vae.decode(z)
    encoded, decoded = [], []
    for overlap in (0, 8, 16, 32):
        limits = c.model_copy(update={"tile_overlap": overlap})
        encoded.append(float((encode_clip(vae, x, limits).mean - z).norm() / z.norm()))
        decoded.append(float((decode_clip(vae, z, limits) - pixels).norm() / pixels.norm()))
    for errors in (encoded, decoded):
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize(("tile", "overlap", "margin"), [(4, 2, 9), (4, 0, 9), (5, 3, 3), (3, 1, None)])
@pytest.mark.parametrize("size", [1, 4, 7, 13])
def test_weights_of_an_axis(tile, overlap, margin, size):
    grid = Grid(tile, overlap, margin)
    total = torch.zeros(size)
    for span in grid.spans(size):
        assert 0 < span.stop - span.start <= tile
        weights = grid.weights(span, size)
        assert len(weights) == span.last - span.first
        total[span.first : span.last] += weights
    assert (total > 0).all()
    if overlap <= tile // 2 and not (margin and overlap >= margin):
        torch.testing.assert_close(total[:1], torch.ones(1))


def test_a_tile_that_does_not_divide():
    c = narrow("walt", tile=20)
    assert any("vae.tile=20 is not divisible by the VAE's stride 8; use one of 16 24" in f for f in c.faults())
    assert any("set vae.tile_overlap" in f for f in narrow("walt", norm="group", tile=16).faults())
    with pytest.raises(ValueError, match="a side of 12 is not divisible by the VAE's stride 8"):
        open_encoder(build(narrow("walt")), narrow("walt", tile=16)).push(torch.zeros(1, 3, 1, 12, 16))
