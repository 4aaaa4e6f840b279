"""A core whose windows are cut elsewhere, and what it says of single tokens, against the core that has them all."""

import itertools

import pytest
import torch

from vidit.config import Model, whole_window
from vidit.model.attention import RelativeBias
from vidit.model.context import EVERY_FRAME, PADDING, TextKeys
from vidit.model.core import WindowCore
from vidit.model.dit import DiT
from vidit.model.plan import sharding_plan
from vidit.model.windows import Grid, merge, numbering, partition

GRIDS = [(1, 3, 5), (3, 5, 3), (4, 4, 2)]
WINDOWS = [(0, 0, 0), (1, 0, 0), (0, 1, 1), (2, 2, 2), (2, 0, 0)]
CPU = torch.device("cpu")


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def setting(axes, window, images, identity):
    """A core, q, k, v, and what it is called with."""
    grid = Grid(*axes, image_B=torch.tensor([False, True]) if images else None)
    core = WindowCore(window, identity_images=identity and window[0] != 1)
    bias = RelativeBias(whole_window(window, axes), 2)
    torch.nn.init.normal_(bias.table, generator=torch.Generator().manual_seed(4))
    frame = torch.tensor([[EVERY_FRAME, EVERY_FRAME, PADDING], [0, axes[0] - 1, PADDING]])
    text = TextKeys(draw(2, 3, 2, 4, seed=5), draw(2, 3, 2, 4, seed=6), frame)
    return core, [draw(2, grid.num_tokens, 2, 4, seed=n) for n in range(3)], (grid, bias(grid).double(), text)


@pytest.mark.parametrize(("images", "identity"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("axes", "window"), itertools.product(GRIDS, WINDOWS))
def test_some_of_the_windows(axes, window, images, identity):
    """Two runs of windows, one after the other, make the whole to the last bit."""
    core, qkv, (grid, bias, text) = setting(axes, window, images, identity)
    window = whole_window(window, axes)
    cut = [partition(x, window, grid).unflatten(0, (2, -1)) for x in qkv]
    count = cut[0].shape[1]
    runs = [slice(0, count // 3), slice(count // 3, count)]
    outs = [
        core.within(*(x[:, run].flatten(0, 1) for x in cut), grid, bias, text, run).unflatten(0, (2, -1))
        for run in runs
        if run.start < run.stop
    ]
    got = merge(torch.cat(outs, 1).flatten(0, 1), window, grid)
    torch.testing.assert_close(got, core(*qkv, grid, bias, text), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("images", "identity"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("axes", "window"), itertools.product(GRIDS, WINDOWS))
def test_what_is_said_of_tokens_is_what_happens(axes, window, images, identity):
    core, (q, k, v), (grid, bias, text) = setting(axes, window, images, identity)
    pairs = core.pairs(grid, CPU, text)
    if core.keeps_values(grid):
        assert pairs is None
        return
    place = pairs.place_S
    logits = torch.einsum("bsnk,btnk->bnst", q, k) / 2 + bias[:, place[:, None], place[None, :]]
    group = torch.zeros(1, grid.num_tokens) if pairs.group_BS is None else pairs.group_BS
    sees = group[:, :, None] == group[:, None, :]
    logits = logits.masked_fill(~sees[:, None], float("-inf"))
    of_text = torch.einsum("bsnk,btnk->bnst", q, text.key_BLNK) / 2
    of_text = of_text.masked_fill(~pairs.text_BSL[:, None], float("-inf"))
    weight = torch.cat((logits, of_text), -1).softmax(-1)
    got = torch.einsum("bnst,btnk->bsnk", weight, torch.cat((v, text.value_BLNK), 1))
    if pairs.unchanged_B is not None:
        got = torch.where(pairs.unchanged_B[:, None, None, None], v, got)
    torch.testing.assert_close(got, core(q, k, v, grid, bias, text), rtol=1e-12, atol=1e-12)
    for first, last in itertools.combinations(range(0, grid.num_tokens + 1, 4), 2):
        low, high = core.reach(grid, first, last)
        seen = sees[:, first:last].any(0).any(0).nonzero().flatten()
        assert low <= seen[0]
        assert seen[-1] < high <= grid.num_tokens


@pytest.mark.parametrize(("axes", "window"), itertools.product(GRIDS, WINDOWS))
def test_numbers_are_places_in_the_partition(axes, window):
    grid, window = Grid(*axes), whole_window(window, axes)
    windows, places = numbering(window, grid, CPU)
    cut = partition(torch.arange(1, grid.num_tokens + 1)[None, :, None], window, grid)[..., 0]
    assert torch.equal(cut[windows, places], torch.arange(1, grid.num_tokens + 1))


def test_the_plan_knows_every_window_and_where_positions_go():
    c = Model(num_layers=5, width=32, num_heads=2, mlp_width=48, windows=((1, 0, 0), (0, 2, 4)))
    with torch.device("meta"):
        model = DiT(c, 3, (3, 4, 6), 10)
    plan, grid = sharding_plan(c), (3, 4, 6)
    assert list(plan.windows) == [f"blocks.{n}" for n in range(5)]
    for name, window in plan.windows.items():
        assert whole_window(window, grid) == whole_window(model.get_submodule(name).attn.core.window, grid)
    names = list(type(model.blocks["0"]).forward.__code__.co_varnames)
    assert plan.positions == {"positions": names.index("positions") - 1}  # without self
    assert plan.positions.keys() <= plan.split.keys()
