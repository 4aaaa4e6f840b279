"""The U-Net: sizes, gradients, images beside clips, and a video model that begins as the image model it is made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vidit.config import UNET_FAMILIES, Unet
from vidit.model.context import EVERY_FRAME, PADDING, TextContext
from vidit.model.flops import forward_flops, parameter_count
from vidit.model.init import initialise
from vidit.model.unet.temporal import TemporalLayer
from vidit.model.unet.unet import TEMPORAL, UNITS, Cell, VideoUnet
from vidit.model.windows import Grid

SMALL: dict[str, Any] = {
    "channels": 8, "multipliers": (1, 2, 2), "num_res_blocks": 1, "attention": (True, True, False), "head_dim": 4,
    "norm_groups": 4,
}  # fmt: skip
FAMILIES = list(UNET_FAMILIES)
TEXT, FRAMES = 12, 5


def config(family: str = "video-ldm", **changes: Any) -> Unet:
    return Unet(**{**SMALL, **UNET_FAMILIES.get(family, {}), **changes})


def build(c: Unet, noise: float = 0.0, dtype: torch.dtype = torch.float64) -> VideoUnet:
    """With `noise` no path is closed by a zero."""
    unet = VideoUnet(c, 3, (FRAMES, 7, 5), TEXT)
    initialise(unet, seed=1)
    if noise:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in unet.parameters():
                p += noise * torch.randn(p.shape, generator=generator)
    unet.dtype = dtype
    return unet.to(dtype)


def open_image_layers(unet: VideoUnet) -> VideoUnet:
    """As if trained on images: nothing but the layers over time is zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if TEMPORAL not in name:
                p += 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return unet


def inputs(rows: int = 2, frames: int = FRAMES, height: int = 7, width: int = 5, image_B: Tensor | None = None) -> Any:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 3, frames, height, width, generator=generator, dtype=torch.float64)
    text = torch.randn(rows, 6, TEXT, generator=generator, dtype=torch.float64)
    frame = torch.full((rows, 6), EVERY_FRAME)
    frame[:, 4:] = PADDING
    time = torch.linspace(100, 900, rows, dtype=torch.float64)
    grid = Grid(frames, height, width, image_B, torch.linspace(4, 30, rows, dtype=torch.float64))
    return x, grid, time, text, frame, text.mean(1)


def image_of(unet: VideoUnet, clip: tuple[Any, ...], row: int, frame: int) -> Tensor:
    """What one frame of a row gives as an image by itself, (C, 1, H, W)."""
    x, grid, time, text, seen, pooled = clip
    own = slice(row, row + 1)
    out: Tensor = unet(
        x[own, :, frame : frame + 1], Grid(1, *grid.shape[1:]), time[own], text[own], seen[own], pooled[own]
    )
    return out[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("frames", "height", "width"), [(5, 7, 5), (1, 8, 8), (2, 1, 3), (3, 4, 6)])
def test_any_size_comes_back(family: str, frames: int, height: int, width: int) -> None:
    unet, given = build(config(family), 0.1), inputs(2, frames, height, width)
    out = unet(*given)
    assert out.shape == given[0].shape
    assert bool(out.isfinite().all())
    assert bool((out != 0).all())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("image_B", [None, torch.tensor([False, True])])
def test_every_parameter_has_a_gradient(family: str, image_B: Tensor | None) -> None:
    unet = build(config(family, pooled_text=True, frame_rate=True), 0.1)
    unet(*inputs(image_B=image_B)).square().sum().backward()
    # A bias of keys, or of queries over one frame, has none; there is no such bias here.
    assert [n for n, p in unet.named_parameters() if p.grad is None or not bool(p.grad.any())] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_images_gives_layers_over_time_gradients_of_zero(family: str) -> None:
    """Ranks that average gradients have the same ones, whatever rows each has."""
    for given in (inputs(frames=1), inputs(image_B=torch.tensor([True, True]))):
        unet = build(config(family), 0.1)
        unet(*given).square().sum().backward()
        for name, p in unet.named_parameters():
            assert p.grad is not None, name
            assert bool(p.grad.any()) == (TEMPORAL not in name), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_video_model_is_its_image_model(family: str) -> None:
    """Bit for bit, with the image model's weights: each frame of a clip is what it would be as an image."""
    image = open_image_layers(build(config(family, temporal="none")))
    video = build(config(family))
    missing, unknown = video.load_state_dict(image.state_dict(), strict=False)
    assert unknown == []
    assert missing
    assert all(TEMPORAL in name for name in missing)
    clip = inputs()
    out = video(*clip)
    assert bool(out.any())
    assert torch.equal(out, image(*clip))
    alone = torch.cat([image_of(image, clip, 0, frame) for frame in range(FRAMES)], dim=1)
    torch.testing.assert_close(out[0], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_layers_over_time_mix_frames_of_clips_and_not_of_images(family: str) -> None:
    unet, image_B = build(config(family), 0.1), torch.tensor([False, True])
    x, grid, time, text, seen, pooled = inputs(image_B=image_B)
    other = x.clone()
    other[:, :, -1] += 1
    changed = unet(other, grid, time, text, seen, pooled) != unet(x, grid, time, text, seen, pooled)
    assert bool(changed[:, :, -1].any())
    assert bool(changed[0, :, 0].any()), "a clip's first frame sees its last"
    assert not bool(changed[1, :, :-1].any()), "an image sees no other"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_images_is_so_many_images_each_with_its_caption(family: str) -> None:
    unet, clip = build(config(family), 0.1), inputs(image_B=torch.tensor([False, True]))
    x, grid, time, text, _, pooled = clip
    own = torch.full((2, 6), EVERY_FRAME)
    own[1] = torch.tensor([0, 1, 2, 3, 4, PADDING])
    out = unet(x, grid, time, text, own, pooled)
    for frame in range(FRAMES):
        word = slice(frame, frame + 1)
        alone = unet(
            x[1:, :, word], Grid(1, 7, 5), time[1:], text[1:, word], torch.full((1, 1), EVERY_FRAME), pooled[1:]
        )
        torch.testing.assert_close(out[1, :, word], alone[0], rtol=0, atol=1e-11)


def test_memory_formats_do_not_matter_where_image_layers_are_frozen() -> None:
    """torch 2.13 ends the process where a norm's weight alone has a gradient and its input is in channels_last."""
    unet = build(config("make-a-video"), 0.1)
    for name, p in unet.named_parameters():
        p.requires_grad_(TEMPORAL in name)
    x, *rest = inputs()
    found = []
    for given in (x, x.contiguous(memory_format=torch.channels_last_3d)):
        unet(given, *rest).square().sum().backward()
        found.append([p.grad.clone() for p in unet.parameters() if p.grad is not None])
        unet.zero_grad()
    assert len(found[0]) == len([n for n, _ in unet.named_parameters() if TEMPORAL in n])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_frame_rate_changes_nothing_until_it_is_trained() -> None:
    plain, told = open_image_layers(build(config())), build(config(frame_rate=True))
    missing, unknown = told.load_state_dict(plain.state_dict(), strict=False)
    assert unknown == []
    assert {name.partition(".")[0] for name in missing} == {"frame_rate"}
    assert torch.equal(told(*inputs()), plain(*inputs()))
    open_image_layers(told)
    x, grid, *rest = inputs()
    slower = replace(grid, fps_B=torch.full((2,), 1.0, dtype=torch.float64))
    assert not torch.equal(told(x, grid, *rest), told(x, slower, *rest))


def test_padding_is_not_seen() -> None:
    unet = build(config("video-ldm"), 0.1)
    x, grid, time, text, seen, pooled = inputs()
    out = unet(x, grid, time, text, seen, pooled)
    other = text.clone()
    other[:, 4:] += 1
    assert torch.equal(unet(x, grid, time, other, seen, pooled), out)
    other[:, 3] += 1
    assert not torch.equal(unet(x, grid, time, other, seen, pooled), out)


def test_mixing_is_the_published_formula() -> None:
    """alpha x + (1 - alpha) (x + r), and x alone where alpha is 1."""
    unet = build(config("video-ldm"), 0.1)
    layers = [m for m in unet.modules() if isinstance(m, TemporalLayer)]
    assert len(layers) == 3 + 2 + 6 + 2 + 1 + 4  # convolutions and attentions: down, bottom, up
    clip, width = inputs(), 8
    x = torch.randn(2 * FRAMES, width, 7, 5, dtype=torch.float64)
    layer = next(m for m in layers if isinstance(m, TemporalLayer))
    text = torch.zeros(2, 6, TEXT, dtype=torch.float64)
    context, cond = TextContext(text, clip[4]), torch.randn(2, 32, dtype=torch.float64)
    residual = layer.residual(x.unflatten(0, (2, -1)), cond, context).flatten(0, 1)
    logit = layer.mix.logit
    assert isinstance(logit, Tensor)
    alpha = torch.sigmoid(logit)
    expected = alpha * x + (1 - alpha) * (x + residual)
    torch.testing.assert_close(layer(x, cond, context, clip[1]), expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        logit.fill_(1e4)
    assert torch.equal(layer(x, cond, context, clip[1]), x)


def test_frames_have_an_order_where_the_config_says_so() -> None:
    """Without positions and convolutions, clips played backwards give the answer backwards."""
    for position, ordered in (("none", False), ("sinusoid", True), ("bias", True)):
        unet = build(config("vdm", temporal_position=position), 0.3)
        x, *rest = inputs()
        same = torch.allclose(unet(x.flip(2), *rest).flip(2), unet(x, *rest), rtol=0, atol=1e-10)
        assert same != ordered, position


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compute_dtype(dtype: torch.dtype) -> None:
    exact = build(config("modelscope"), 0.1)
    unet = build(config("modelscope"), 0.1, torch.float32)
    unet.dtype = dtype
    out = unet(*(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in inputs()))
    assert out.dtype == torch.float32
    error = float((out - exact(*inputs())).norm().detach() / out.norm().detach())
    assert error < (1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("family", [*FAMILIES, "none"])
def test_parameters_and_flops_are_counted_right(family: str) -> None:
    c = config(
        family,
        pooled_text=family == "vdm",
        frame_rate=family == "make-a-video",
        **({"temporal": "none"} if family == "none" else {}),
    )
    unet = build(c)
    assert parameter_count(c, (FRAMES, 7, 5), 3, TEXT) == sum(p.numel() for p in unet.parameters())
    given = inputs(1)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        unet(*given)
    # The counter also counts the two matrices of the time embedding, one vector each, and what each block makes of it.
    counted = counter.get_total_flops() - sum(
        2 * p.numel()
        for n, p in unet.named_parameters()
        if ("time." in n or "pooled" in n or "frame_rate" in n) and n.endswith("weight")
    )
    assert counted == forward_flops(c, (FRAMES, 7, 5), 3, TEXT, 6)


PUBLISHED = {
    # what, all parameters, those over time, in millions
    "sd-2.1": (865.910724, 0.0),
    "video-ldm": (1521.99, 656.076838),
    "modelscope": (1380.82, 514.91),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_sizes(name: str) -> None:
    with torch.device("meta"):
        unet = VideoUnet(Unet.preset(name), 4, (16, 32, 32), 1024)
    total = sum(p.numel() for p in unet.parameters())
    over_time = sum(p.numel() for n, p in unet.named_parameters() if TEMPORAL in n)
    assert total / 1e6 == pytest.approx(PUBLISHED[name][0], abs=0.005)
    assert over_time / 1e6 == pytest.approx(PUBLISHED[name][1], abs=0.005)


def test_the_sizes_are_those_of_the_classes_of_diffusers() -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    with torch.device("meta"):
        image = diffusers.UNet2DConditionModel(attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024)
        video = diffusers.UNetSpatioTemporalConditionModel(num_attention_heads=(5, 10, 20, 20))
        ours = VideoUnet(Unet.preset("video-ldm"), 4, (14, 32, 32), 1024)
    over_time = [p.numel() for n, p in video.named_parameters() if "temporal" in n or "mix" in n or "time_pos" in n]
    assert sum(over_time) == sum(p.numel() for n, p in ours.named_parameters() if TEMPORAL in n)
    assert sum(p.numel() for p in image.parameters()) == sum(
        p.numel() for n, p in ours.named_parameters() if TEMPORAL not in n
    )


def test_every_weight_but_the_ends_is_in_a_unit() -> None:
    unet = build(config())
    cells = [name for name, module in unet.named_modules() if isinstance(module, Cell)]
    assert len(cells) == 3 + 2 + 6
    assert len(UNITS) == 3
    outside = {n.partition(".")[0] for n, _ in unet.named_parameters() if not any(n.startswith(c + ".") for c in cells)}
    assert outside == {"time", "first", "down", "up", "head"}  # of levels the convolutions between them


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": (True,)}, "unet.attention=[True] says it of 1 levels, but unet.multipliers=[1, 2, 2] has 3"),
        ({"norm_groups": 3}, "unet.norm_groups=3 does not divide 8 channels; use one of 1 2 4 8"),
        ({"head_dim": 5}, "unet.head_dim=5 does not divide 8 channels; use one of 1 2 4 8"),
        ({"num_heads": 3}, "unet.num_heads=3 does not divide 8 channels; use one of 1 2 4 8"),
        ({"temporal_convs": 0, "temporal_attention": ()}, "has no layer over time"),
        ({"attention_backend": "flash"}, "unet.attention_backend=flash takes no mask over text"),
        (
            {"attention_backend": "flash", "cross_attention": False, "temporal_attention": ("self",),
             "temporal_position": "bias"},
            "takes no position bias",
        ),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    assert any(message in fault for fault in config(**changes).faults()), list(config(**changes).faults())
    assert list(config().faults()) == []


def test_an_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"no U-Net preset 'sd'; use one of demo sd-2\.1"):
        Unet.preset("sd")
