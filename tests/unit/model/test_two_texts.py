"""Blocks that attend to two encoders in turn (`model.cross_text=interleaved`)."""

from __future__ import annotations

from operator import mul
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vidit.config import FAMILIES, Model
from vidit.model.context import EVERY_FRAME, PADDING, TextContext
from vidit.model.dit import DiT
from vidit.model.flops import forward_flops, parameter_count
from vidit.model.init import initialise
from vidit.model.stage import view_of_stage
from vidit.model.windows import Grid

TINY: dict[str, Any] = {
    "num_layers": 4, "width": 32, "num_heads": 2, "mlp_width": 48, "windows": ((1, 0, 0), (0, 2, 4)),
    "cross_attention": "all", "attention_backend": "sdpa", "cross_text": "interleaved",
}  # fmt: skip
GRID, CHANNELS, FIRST, SECOND = (3, 4, 6), 3, 10, 6
MODELS: dict[str, dict[str, Any]] = {
    "by layers of their own": {"pooled_text": True},
    "as they are": {"cross_keys": "text", "text_embedding": "none"},
    "refined": {"text_embedding": "linear", "num_refiner_layers": 1},
    "gentron": {**FAMILIES["gentron"], "cross_text": "interleaved", "text_embedding": "none", "patch": 1},
}


def build(**changes: Any) -> DiT:
    """No path is closed by a zero."""
    model = DiT(Model(**{**TINY, **changes}), CHANNELS, GRID, FIRST, SECOND)
    initialise(model, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def text(width: int, tokens: int, seed: int) -> TextContext:
    """Of two clips, the second of which is short."""
    features = torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(seed))
    frame = torch.full((2, tokens), EVERY_FRAME)
    frame[1, 2:] = PADDING
    return TextContext(features, frame)


def denoise(model: DiT, first: TextContext, second: TextContext, image_B: Tensor | None = None) -> Tensor:
    g = torch.Generator().manual_seed(1)
    x, pooled = torch.randn(2, CHANNELS, *GRID, generator=g), torch.randn(2, SECOND, generator=g)
    time = torch.tensor([100.0, 700.0])
    assert first.frame_BL is not None
    out: Tensor = model(
        x, Grid(*GRID, image_B), time, first.features_BLD, first.frame_BL, pooled if model.config.pooled_text else None,
        second=second,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_parameters_and_flops(changes: dict[str, Any]) -> None:
    """FLOPs by torch's counter with the math kernel, which it sees on a CPU."""
    c = Model(**{**TINY, **changes, "pooled_text": False})
    with torch.device("meta"):
        model = DiT(c, CHANNELS, GRID, FIRST, SECOND)
    assert sum(p.numel() for p in model.parameters()) == parameter_count(c, GRID, CHANNELS, FIRST, SECOND)
    counted = {"width": 64, "mlp_width": 256, "qk_norm": "none", "windows": ((1, 0, 0),), "relative_position": "none"}
    c = Model(**{**TINY, **changes, **counted, "pooled_text": False, "adaln_rank": 1, "num_refiner_layers": 0})
    grid, tokens, more = (2, 8, 8), 64, 128
    model = DiT(c, 4, grid, 24, 48)
    initialise(model, 0)
    x, second = torch.randn(1, 4, *map(mul, grid, c.patch)), text(48, more, 0)
    seen = torch.full((1, tokens), EVERY_FRAME)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        rows = TextContext(second.features_BLD[:1], seen.new_full((1, more), EVERY_FRAME))
        model(x, Grid(*grid), torch.rand(1), torch.randn(1, tokens, 24), seen, second=rows)
    assert counter.get_total_flops() == pytest.approx(forward_flops(c, grid, 4, 24, tokens, (more, 48)), rel=0.02)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_even_blocks_read_the_second_and_odd_ones_the_first(changes: dict[str, Any]) -> None:
    model, reached = build(**changes), []
    first, second = text(FIRST, 5, 2), text(SECOND, 7, 3)
    other = {"first": text(FIRST, 5, 4), "second": text(SECOND, 7, 5)}
    for block in model.blocks.values():
        block.cross.register_forward_hook(lambda module, args, out: reached.append(out))
    denoise(model, first, second)
    plain = list(reached)
    for name, layer in (("first", 1), ("second", 0)):
        reached.clear()
        denoise(model, **{"first": first, "second": second, name: other[name]})
        changed = [not torch.equal(a, b) for a, b in zip(plain, reached, strict=True)]
        assert changed == [number >= layer for number in range(4)], name


def test_with_the_same_text_twice_it_is_the_model_of_one_encoder() -> None:
    paired = build(pooled_text=True)
    one = DiT(Model(**{**TINY, "cross_text": "first", "pooled_text": True}), CHANNELS, GRID, SECOND)
    state = paired.state_dict()
    own = [name for name in state if "embed.text" not in name]
    one.load_state_dict({name.replace("embed.second_text", "embed.text"): state[name] for name in own})
    paired.embed.text, said = one.embed.text, text(SECOND, 5, 2)
    assert torch.equal(denoise(paired, said, said), denoise(one, said, said))


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_the_seconds_padding_changes_nothing(changes: dict[str, Any]) -> None:
    model, first, second = build(**changes), text(FIRST, 5, 2), text(SECOND, 7, 3)
    noisy = second.features_BLD.clone()
    noisy[1, 2:] = 100
    a, b = (denoise(model, first, said) for said in (second, second._replace(features_BLD=noisy)))
    torch.testing.assert_close(a, b)
    noisy[1, 1] = 100
    assert not torch.allclose(a, denoise(model, first, second._replace(features_BLD=noisy)))


def test_an_image_of_a_row_sees_its_own_caption() -> None:
    model, first, second = build(image_attention="frame"), text(FIRST, 3, 2), text(SECOND, 3, 3)
    image_B, frames = torch.tensor([True, False]), torch.full((2, 3), EVERY_FRAME)
    frames[0] = torch.arange(3)
    first, second = (said._replace(frame_BL=frames) for said in (first, second))
    plain, moved = denoise(model, first, second, image_B), second.features_BLD.clone()
    moved[0, 2] += 1
    changed = denoise(model, first, second._replace(features_BLD=moved), image_B) - plain
    assert changed[0, :, :2].abs().max() < 1e-5
    assert changed[0, :, 2].abs().max() > 1e-3


def test_stages_in_a_row_are_the_model() -> None:
    whole, first, second = build(pooled_text=True), text(FIRST, 5, 2), text(SECOND, 7, 3)
    g = torch.Generator().manual_seed(1)
    tokens, pooled = torch.randn(2, CHANNELS, *GRID, generator=g), torch.randn(2, SECOND, generator=g)
    given = torch.tensor([100.0, 700.0]), first.features_BLD, first.frame_BL, pooled, None, second
    for layers in (range(1), range(1, 2), range(2, 4)):
        tokens = view_of_stage(whole, layers, 4)(tokens, Grid(*GRID), *given)
    assert torch.equal(tokens, denoise(whole, first, second))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"cross_attention": "per_frame"}, "only even blocks attend to text"),
        ({"num_layers": 1}, "use cross_attention=all and at least 2 layers"),
        ({"text_embedding": "none"}, "set model.cross_attention=all, model.cross_keys=text"),
        ({**FAMILIES["cogvideox"], "text_embedding": "none"}, "the same projections are for video tokens"),
    ],
)
def test_refused(changes: dict[str, Any], told: str) -> None:
    assert any(told in fault for fault in Model(**{**TINY, **changes}).faults())
