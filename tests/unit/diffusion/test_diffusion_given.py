"""Which frames are given: every kind against its definition, shares as configured, and a loss that leaves them out."""

import numpy as np
import pytest
import torch

from vidit.config import Diffusion, Given
from vidit.diffusion.given import given_frames
from vidit.diffusion.objective import build_objective


def drawn(kind, frames, share=1.0, draws=400):
    generator = np.random.default_rng(0)
    return [given_frames([Given(kind=kind, share=share)], frames, generator) for _ in range(draws)]


def places(row):
    return tuple(frame for frame, given in enumerate(row) if given)


@pytest.mark.parametrize(
    ("kind", "frames", "expected"),
    [
        ("image_head", 5, {(0,)}),
        ("image_tail", 5, {(4,)}),
        ("image_head_tail", 5, {(0, 4)}),
        ("image_random", 3, {(0,), (1,), (2,)}),
        ("quarter_head", 8, {(0,), (0, 1)}),
        ("quarter_tail", 8, {(7,), (6, 7)}),
        ("quarter_head_tail", 8, {(0, 7), (0, 1, 6, 7)}),
        ("quarter_random", 4, {(0,), (1,), (2,), (3,)}),
        ("quarter_random", 9, {(n,) for n in range(9)} | {(n, n + 1) for n in range(8)}),
        ("interpolate", 5, {(0, 2, 4), (1, 3)}),
        ("image_head_tail", 2, {(0,)}),
        ("image_head", 1, {()}),
        ("random", 1, {()}),
    ],
)
def test_kinds(kind, frames, expected):
    assert {places(row) for row in drawn(kind, frames)} == expected


def test_random_gives_any_number_but_all():
    assert {len(places(row)) for row in drawn("random", 4, draws=2000)} == {0, 1, 2, 3}
    assert sum(map(sum, drawn("random", 12, draws=2000))) / 24_000 == pytest.approx(0.5, abs=0.03)


def test_shares():
    kinds = [Given(kind="image_head", share=0.2), Given(kind="image_tail", share=0.3)]
    generator = np.random.default_rng(1)
    rows = [places(given_frames(kinds, 6, generator)) for _ in range(4000)]
    assert [rows.count(k) / 4000 for k in ((0,), (5,), ())] == pytest.approx([0.2, 0.3, 0.5], abs=0.03)


def test_given_frames_do_not_count():
    objective = build_objective(Diffusion())
    g = torch.Generator().manual_seed(0)
    x, noise, out = (torch.randn(2, 3, 4, 5, 5, generator=g, requires_grad=n == 2) for n in range(3))
    t, given = torch.tensor([0.3, 0.6]), torch.tensor([[True, False, False, True], [False] * 4])
    loss = objective.loss(out, x, noise, t, given)
    kept = objective.loss(out[:1, :, 1:3], x[:1, :, 1:3], noise[:1, :, 1:3], t[:1])
    torch.testing.assert_close(loss, torch.cat((kept, objective.loss(out, x, noise, t)[1:])))
    loss.sum().backward()
    assert (out.grad.abs().amax((1, 3, 4)) == 0).tolist() == given.tolist()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"given": ({"kind": "random", "share": 0.7}, {"kind": "image_head", "share": 0.4})}, "shares of 1.1 in all"),
        ({"given": ({"kind": "random", "share": 0.1},) * 2}, "names random 2 times"),
    ],
)
def test_faults(changes, told):
    assert any(told in fault for fault in Diffusion(**changes).faults())
