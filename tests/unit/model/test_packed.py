"""Packed rows: clips side by side give what they give one by one, outputs and gradients, in fp64."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vidit.config import FAMILIES, Model, Window
from vidit.model.attention import attend_text
from vidit.model.context import EVERY_FRAME, PADDING, Positions, TextContext
from vidit.model.core import WindowCore, attend
from vidit.model.dit import DiT
from vidit.model.packed import FirstToken, clip_by_clip, clip_means, packed, per_token, tokens_of
from vidit.model.packed import runs as runs_of
from vidit.model.packed import side_by_side as joined
from vidit.model.position import packed_places
from vidit.model.windows import Grid

CHANNELS, TEXT, TOKENS, SECOND = 3, 10, 6, 8
CLIPS: tuple[Window, ...] = ((3, 5, 3), (1, 4, 6), (1, 4, 6), (2, 4, 4), (1, 2, 3))
"""In tokens: odd numbers, images of two shapes, two of them neighbours."""
TINY: dict[str, Any] = {
    "num_layers": 3, "width": 48, "num_heads": 4, "mlp_width": 64, "windows": ((1, 0, 0), (0, 2, 2)),
    "pooled_text": True, "attention_backend": "sdpa", "relative_position": "rope",
}  # fmt: skip
NO_TEXT = {"pooled_text": False}
MODELS: dict[str, dict[str, Any]] = {
    "windows, identity": {"frame_rate": True},
    "in frame, learned": {"image_attention": "frame", "cross_attention": "all", "absolute_position": "learned"},
    "given channels": {"given_channels": True},
    "times of frames": {"frame_times": True, "frame_rate": True},
    "sincos": {"absolute_position": "sincos", "relative_position": "none"},
    **{name: {**NO_TEXT, **fields} for name, fields in FAMILIES.items()},
    "gentron still": {**FAMILIES["gentron"], "motion_free": 0.5},
    "two texts": {
        **FAMILIES["gentron"], "cross_text": "interleaved", "text_embedding": "none", "pooled_width": TEXT,
    },
    "stdit3 frames": {**FAMILIES["stdit3"], "frame_times": True},
    "hunyuanvideo": {**FAMILIES["hunyuanvideo"], "num_single_layers": 1},
}  # fmt: skip


def model_of(name: str) -> DiT:
    c = Model(**{**TINY, **MODELS[name]})
    with torch.device("meta"):
        model = DiT(c, CHANNELS, (3, 5, 6), TEXT, SECOND if c.cross_text == "interleaved" else 0).double()
    model.dtype = torch.float64
    model.to_empty(device="cpu")
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():  # gates and the output start at zero, which would hide everything
        for key, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g, dtype=torch.float64)
            p.copy_(1 + 0.2 * noise if "norm" in key else noise / max(3, p.shape[-1]) ** 0.5)
    return model


def inputs(c: Model) -> list[dict[str, Any]]:
    """Of each clip what its model takes, as a row of a batch."""
    g, rows = torch.Generator().manual_seed(2), []
    for number, grid in enumerate(CLIPS):
        size = [axis * patch for axis, patch in zip(grid, c.patch, strict=True)]
        mask = torch.arange(TOKENS) < TOKENS - number
        given = torch.randn(1, CHANNELS + 1, *size, generator=g, dtype=torch.float64) if c.given_channels else None
        said = torch.randn(1, TOKENS - 1, SECOND, generator=g, dtype=torch.float64)
        rows.append({
            "second": TextContext(said, torch.where(mask, EVERY_FRAME, PADDING)[None, 1:]),
            "x": torch.randn(1, CHANNELS, *size, generator=g, dtype=torch.float64),
            "time_B": torch.rand(1, *[size[0]] * c.frame_times, generator=g, dtype=torch.float64) * 1000,
            "text_BLE": torch.randn(1, TOKENS, TEXT, generator=g, dtype=torch.float64),
            "text_frame_BL": torch.where(mask, EVERY_FRAME, PADDING)[None],
            "pooled_BE": torch.randn(1, TEXT, generator=g, dtype=torch.float64),
            "previous_BCTHW": torch.randn(1, CHANNELS, *size, generator=g, dtype=torch.float64),
            "grid": Grid(
                *grid, given_BCTHW=given, still_B=torch.tensor([number % 2 == 0]) if c.motion_free else None,
                fps_B=torch.tensor([8.0 * number], dtype=torch.float64) if c.frame_rate else None,
            ),
        })  # fmt: skip
    return rows


def side_by_side(c: Model, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The same as one packed row."""

    def joined(name: str) -> Tensor | None:
        values = [getattr(row["grid"], name) for row in rows]
        return None if values[0] is None else torch.cat(values)

    def latent(values: list[Tensor]) -> Tensor:
        return torch.cat([tokens_of(x, c.patch) for x in values], dim=1)

    given = [row["grid"].given_BCTHW for row in rows]
    grid = replace(
        packed(CLIPS), fps_B=joined("fps_B"), still_B=joined("still_B"),
        given_BCTHW=latent(given) if c.given_channels else None,
    )  # fmt: skip
    second = TextContext(*(torch.cat([row["second"][part] for row in rows]) for part in (0, 1)))
    whole: dict[str, Any] = {"grid": grid, "second": second}
    whole |= {name: torch.cat([row[name].flatten(0, row[name].ndim - 1 - inner) for row in rows])
             for name, inner in (("time_B", 0), ("text_BLE", 2), ("text_frame_BL", 1), ("pooled_BE", 1))}  # fmt: skip
    return whole | {name: latent([row[name] for row in rows]) for name in ("x", "previous_BCTHW")}


def gradients(model: DiT, total: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    total.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def loss_of(out: Tensor, target: Tensor) -> Tensor:
    return (out - target).square() * (1.5 + target.sin())


def differences(model: DiT) -> tuple[float, float]:
    """Largest relative ones between a packed row and its clips one by one: of outputs, of gradients."""
    rows = inputs(model.config)
    outs = [model(**row) for row in rows]
    targets = [torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype) for out in outs]
    mean = torch.stack([loss_of(out, y).mean() for out, y in zip(outs, targets, strict=True)]).mean()
    expected = gradients(model, mean)
    whole = side_by_side(model.config, rows)
    out = model(**whole)
    right, target = (torch.cat([tokens_of(x, model.config.patch) for x in xs], dim=1) for xs in (outs, targets))
    forward = float((out - right).detach().abs().max() / right.detach().abs().max())
    found = gradients(model, clip_means(loss_of(out, target).flatten(2).mean(2)[0], whole["grid"]).mean())
    # Some biases have gradients of 0, of which rounding is left: those below 1e-4 of the largest count as that.
    floor = 1e-4 * max(float(g.norm()) for g in expected.values())
    gradient = max(float((found[k] - g).norm()) / max(floor, float(g.norm())) for k, g in expected.items())
    return forward, gradient


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_row_is_its_clips_one_by_one(name: str) -> None:
    forward, gradient = differences(model_of(name))
    assert forward <= 1e-13
    assert gradient <= 1e-12


def test_a_clip_that_sees_its_neighbour_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were two neighbours taken for one clip, the comparison would tell."""
    model, blind = model_of("wan"), (CLIPS[0], (2, 4, 6), *CLIPS[3:])

    def mixed(core: WindowCore, q: Tensor, k: Tensor, v: Tensor, grid: Grid, text: None) -> Any:
        return clip_by_clip(core, q, k, v, replace(grid, clips=blind), text)

    monkeypatch.setattr("vidit.model.core.clip_by_clip", mixed)
    assert differences(model)[1] > 1e-3


@pytest.mark.parametrize("size", [1, 9, 24, 45, 50, 77, 130])
def test_text_of_some_tokens_is_that_of_all(size: int) -> None:
    """A rank that holds a part of the row tells by its positions where that begins: cuts in and between clips."""
    grid, g = packed(CLIPS), torch.Generator().manual_seed(0)
    q = torch.randn(1, grid.num_tokens, 2, 8, generator=g, dtype=torch.float64)
    k, v = (torch.randn(len(CLIPS), TOKENS, 2, 8, generator=g, dtype=torch.float64) for _ in range(2))
    frame = torch.full((len(CLIPS), TOKENS), EVERY_FRAME)
    frame[1, 2:] = PADDING
    mask = (frame != PADDING)[:, None, None]

    def padded(x: Tensor) -> Tensor:
        return torch.cat((x, x.new_zeros(-len(x) % size, *x.shape[1:])))

    places = packed_places(grid, torch.device("cpu"))
    for seen in (frame, None):
        alone = []
        for run in runs_of(grid):
            rows = q[0, run.tokens].unflatten(0, (run.clips.stop - run.clips.start, -1))
            own = None if seen is None else mask[run.clips]
            alone.append(attend(rows, k[run.clips], v[run.clips], own, "sdpa"))
        whole = joined(alone)
        torch.testing.assert_close(attend_text(q, k, v, seen, Positions(places, places, places), grid), whole)
        found = []
        for own_q, own in zip(padded(q[0]).split(size), padded(places).split(size), strict=True):
            positions = Positions(own, own, own, FirstToken())
            found.append(attend_text(own_q[None], k, v, seen, positions, grid))
            assert found[-1].shape == own_q[None].shape
        torch.testing.assert_close(torch.cat(found, dim=1)[:, : grid.num_tokens], whole)


def varlen(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, most_q: int, most_k: int, deterministic: bool
) -> Tensor:
    """What flash-attn promises of `flash_attn_varlen_func`, on any device: (tokens, N, K)."""
    assert starts_q.dtype == starts_k.dtype == torch.int32
    out = torch.empty_like(q)
    for first, last, first_k, last_k in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        assert 0 < last - first <= most_q
        assert last_k - first_k <= most_k
        own = (x[None, a:b] for x, a, b in ((q, first, last), (k, first_k, last_k), (v, first_k, last_k)))
        out[first:last] = attend(*own, None, "sdpa")[0]
    return out


def test_one_call_for_all_clips_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where flash-attn takes a row, it is told where clips begin; windows, text and unchanged images go another way."""
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=varlen))
    grid, g = packed(CLIPS), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, grid.num_tokens, 2, 8, generator=g, dtype=torch.float64) for _ in range(3))
    whole, apart = WindowCore((0, 0, 0), "flash"), WindowCore((0, 0, 0), "sdpa")
    torch.testing.assert_close(whole(q, k, v, grid), apart(q, k, v, grid), rtol=1e-12, atol=1e-12)
    assert whole.is_one_kernel(grid, None)
    assert not WindowCore((0, 2, 2)).is_one_kernel(grid, None)
    assert not WindowCore((0, 0, 0), identity_images=True).is_one_kernel(grid, None)
    assert WindowCore((0, 0, 0), identity_images=True).is_one_kernel(packed(CLIPS[:1]), None)
    assert not whole.is_one_kernel(replace(grid, image_B=torch.zeros(len(CLIPS), dtype=torch.bool)), None)


def test_numbers_of_clips_and_frames_are_spread_over_tokens() -> None:
    grid = packed(((2, 1, 2), (1, 1, 3)))
    assert per_token(torch.tensor([5, 6]), grid).tolist() == [5, 5, 5, 5, 6, 6, 6]
    assert per_token(torch.tensor([1, 2, 3]), grid).tolist() == [1, 1, 2, 2, 3, 3, 3]
    x = torch.tensor([1.0, 1, 3, 3, 7, 8, 9])
    assert clip_means(x, grid).tolist() == [2, 8]
    assert clip_means(x, grid, torch.tensor([0, 0, 1, 1, 1, 0, 1]).bool()).tolist() == [3, 8]
