"""Attention that skips (Skiparse) against plain masks over all tokens, fp64: outputs and gradients, odd grids too."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from vidit.config import FAMILIES, ConfigError, Model, RunConfig
from vidit.model.context import EVERY_FRAME, PADDING, TextKeys
from vidit.model.core import WindowCore
from vidit.model.flops import window_of, window_tokens
from vidit.model.windows import Grid, merge, numbering, padding_mask, partition
from vidit.overrides import apply_overrides
from vidit.resolve import faults

GRIDS = [(3, 5, 3), (4, 4, 4), (2, 4, 4), (1, 3, 3), (1, 1, 1), (5, 7, 3)]
SKIPS: list[Any] = [("single", 2), ("group", 2), ("single", 4), ("group", 4), ("single", 3), ("group", 3)]


def group_of(kind: str, k: int, number: int) -> int:
    """As the paper says: b (g k) d -> (k b) g d, and b (n m k) d -> (m b) (n k) d with m = k."""
    if kind == "single":
        return number - number // k * k
    return (number // k) % k


def plain_mask(skip: tuple[str, int], grid: Grid) -> Tensor:
    """(B or 1, S, S): who sees whom, written token by token; images see their own frame alone."""
    tokens = range(grid.num_tokens)
    group = torch.tensor([group_of(*skip, i) for i in tokens])
    same = (group[:, None] == group)[None]
    if grid.image_B is None:
        return same
    frame = torch.tensor([i // (grid.height * grid.width) for i in tokens])
    return same & ((frame[:, None] == frame)[None] | ~grid.image_B[:, None, None])


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    logits = torch.einsum("bsnk,btnk->bnst", q, k) / q.shape[-1] ** 0.5
    weights = logits.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bnst,btnk->bsnk", weights, v)


def drawn(*shape: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def assert_same(one: Tensor, other: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    weight = torch.cos(torch.arange(one.numel(), dtype=torch.float64)).reshape(one.shape)
    for a, b in zip(
        torch.autograd.grad((one * weight).sum(), leaves),
        torch.autograd.grad((other * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("skip", SKIPS, ids=str)
@pytest.mark.parametrize("shape", GRIDS, ids=str)
def test_the_core_is_the_plain_mask(shape: tuple[int, int, int], skip: Any, images: bool) -> None:
    grid = Grid(*shape, torch.tensor([False, True]) if images else None)
    q, k, v = drawn(2, grid.num_tokens, 2, 4)
    out = WindowCore(skip, "sdpa")(q, k, v, grid)
    assert_same(out, plain(q, k, v, plain_mask(skip, grid)), [q, k, v])


@pytest.mark.parametrize("skip", SKIPS[:4], ids=str)
@pytest.mark.parametrize("images", [False, True])
def test_with_text_among_the_keys(skip: Any, images: bool) -> None:
    grid = Grid(3, 5, 3, torch.tensor([False, True]) if images else None)
    q, k, v = drawn(2, grid.num_tokens, 2, 4)
    text_k, text_v, _ = drawn(2, 5, 2, 4, seed=1)
    frame = torch.full((2, 5), EVERY_FRAME)
    frame[0, 3:] = PADDING
    if images:
        frame[1] = torch.tensor([0, 1, 2, 2, PADDING])
    out = WindowCore(skip, "sdpa")(q, k, v, grid, text=TextKeys(text_k, text_v, frame))
    of_token = torch.arange(grid.num_tokens) // 15
    said = (frame[:, None] == EVERY_FRAME) | (frame[:, None] == of_token[None, :, None])
    mask = torch.cat((plain_mask(skip, grid).expand(2, -1, -1), said), dim=-1)
    expected = plain(q, torch.cat((k, text_k), 1), torch.cat((v, text_v), 1), mask)
    assert_same(out, expected, [q, k, v, text_k, text_v])


@pytest.mark.parametrize("skip", SKIPS, ids=str)
@pytest.mark.parametrize("shape", GRIDS, ids=str)
def test_cutting_and_back(shape: tuple[int, int, int], skip: Any) -> None:
    grid = Grid(*shape)
    tokens = grid.num_tokens
    numbers = torch.arange(1, tokens + 1)[None, :, None]
    cut = partition(numbers, skip, grid)
    assert cut.shape == (skip[1], window_tokens(skip, shape), 1)
    for window, row in enumerate(cut[..., 0].tolist()):
        found = [n - 1 for n in row if n]
        assert found == [i for i in range(tokens) if group_of(*skip, i) == window], "in the order of the clip"
    assert torch.equal(merge(cut, skip, grid), numbers)
    real = padding_mask(skip, grid, torch.device("cpu"))
    assert (real is None) == (tokens % skip[1] ** 2 == 0)
    assert real is None or torch.equal(real, cut[..., 0] > 0)
    windows, places = numbering(skip, grid, torch.device("cpu"))
    assert torch.equal(cut[windows, places, 0], torch.arange(1, tokens + 1))


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("skip", SKIPS[:4], ids=str)
def test_who_sees_whom_is_told_to_a_ring(skip: Any, images: bool) -> None:
    grid = Grid(3, 5, 3, torch.tensor([False, True]) if images else None)
    core = WindowCore(skip)
    pairs = core.pairs(grid, torch.device("cpu"))
    assert pairs is not None
    assert pairs.group_BS is not None
    assert torch.equal(pairs.group_BS[:, :, None] == pairs.group_BS[:, None], plain_mask(skip, grid))
    assert core.reach(grid, 7, 9) == (0, 45)


def test_two_blocks_join_all_tokens() -> None:
    """Single and group skips in turn: from any token every other is two steps away (2412.00131)."""
    grid = Grid(2, 4, 8)
    one, two = (plain_mask((kind, 4), grid)[0].double() for kind in ("single", "group"))
    assert bool((one @ two > 0).all())
    assert one.mean() == two.mean() == pytest.approx(1 / 4)
    assert not bool((one @ one > 0).all())


def test_blocks_of_a_model() -> None:
    c = Model.preset("opensora-plan-1.3")
    kinds = [window_of(c, layer) for layer in range(32)]
    assert kinds[:2] == kinds[30:] == [(0, 0, 0)] * 2
    assert kinds[2:30] == [("single", 4), ("group", 4)] * 14
    assert window_tokens(kinds[2], (24, 45, 80)) == 24 * 45 * 80 // 4


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"relative_position": "bias"}, "use rope or none"),
        ({"windows": (("single", 1),)}, "use (0, 0, 0)"),
        ({"num_layers": 4, "full_ends": 2}, "full_ends of at most 1"),
        ({"windows": ((0, 0, 0),)}, "use windows=[[0,0,0]] and full_ends=0"),
        ({"cross_attention": "joint"}, "use windows=[[0,0,0]]"),
    ],
)
def test_faults(changes: dict[str, Any], told: str) -> None:
    c = Model(**{**FAMILIES["opensora_plan"], **changes})
    assert any(told in fault for fault in c.faults()), list(c.faults())
    assert list(Model.preset("opensora-plan-1.3").faults()) == []


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ('[["singel",4]]', r"model\.windows\.0\.skip\.0='singel': Input should be 'single' or 'group'"),
        ('[["group"]]', r"model\.windows\.0\.skip\.1=.*the list holds fewer entries"),
        ('[["group",0]]', r"model\.windows\.0\.skip\.1=0: Input should be greater than 0"),
        ("[[1,0]]", r"model\.windows\.0\.box\.2=.*the list holds fewer entries"),
    ],
)
def test_a_window_that_is_none_is_told_as_what_it_was_meant(written: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        apply_overrides(RunConfig(name="a"), [f"model.windows={written}"])
    assert len(caught.value.faults) == 1
    given = apply_overrides(RunConfig(name="a"), ['model.windows=[["single",4],[1,0,0]]'])
    assert given.model.windows == (("single", 4), (1, 0, 0))
    assert RunConfig.model_validate_json(given.model_dump_json()) == given


@pytest.mark.parametrize(("side", "refused"), [(64, False), (48, True)])
def test_images_of_a_row_have_whole_groups(side: int, refused: bool) -> None:
    """4 x 4 and 3 x 3 tokens, in groups of 4."""
    model = {**FAMILIES["opensora_plan"], "num_layers": 6}
    data = {"train": "x", "height": side, "width": side, "image_rows": 1}
    c = RunConfig.model_validate(
        {"name": "a", "model": model, "data": data, "vae": {"weights": "x"}, "train": {"micro_batch": 2}}
    )
    told = [fault for fault in faults(c) if "counts tokens in groups of 4" in fault]
    assert len(told) == refused


def test_an_image_sees_in_a_row_what_it_sees_alone() -> None:
    """Where its tokens are whole groups."""
    for skip in itertools.product(("single", "group"), (2, 4)):
        row = plain_mask(skip, Grid(3, 2, 4, torch.tensor([True])))[0]
        alone = plain_mask(skip, Grid(1, 2, 4))[0]
        assert all(torch.equal(row[f * 8 : f * 8 + 8, f * 8 : f * 8 + 8], alone) for f in range(3))
