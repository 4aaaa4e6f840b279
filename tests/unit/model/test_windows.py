"""Window partition, its inverse and its mask, against loops that follow the definition word for word."""

import itertools

import pytest
import torch

from vidit.config import whole_window
from vidit.model.windows import Grid, counts, merge, padding_mask, partition

CASES = [
    (grid, window)
    for grid in [(1, 1, 1), (1, 5, 3), (3, 5, 7), (5, 4, 6), (4, 1, 9)]
    for window in [(0, 0, 0), (1, 0, 0), (0, 1, 1), (1, 2, 2), (2, 3, 4), (0, 2, 0), (2, 0, 0), (3, 0, 5), (9, 9, 9)]
]


def ids(case):
    return "x".join(map(str, case))


def tokens_of_windows(grid, window):
    """For each window in order, its token numbers in order; None stands for a place past the grid."""
    place = {p: n for n, p in enumerate(itertools.product(*map(range, grid)))}
    corners = itertools.product(*(range(0, size, step) for size, step in zip(grid, window, strict=True)))
    return [
        [place.get(tuple(c + o for c, o in zip(corner, offset, strict=True))) for offset in offsets_of(window)]
        for corner in corners
    ]


def offsets_of(window):
    return itertools.product(*map(range, window))


@pytest.mark.parametrize(("axes", "window"), CASES, ids=ids)
def test_partition_is_the_loop(axes, window):
    grid = Grid(*axes)
    window = whole_window(window, grid.shape)
    x = torch.arange(1.0, 2 * grid.num_tokens * 6 + 1, dtype=torch.float64).reshape(2, grid.num_tokens, 2, 3)
    expected = [
        torch.stack([x[row, n] if n is not None else torch.zeros(2, 3, dtype=x.dtype) for n in tokens])
        for row in range(2)
        for tokens in tokens_of_windows(axes, window)
    ]
    got = partition(x, window, grid)
    assert torch.equal(got, torch.stack(expected))
    assert torch.equal(merge(got, window, grid), x)


@pytest.mark.parametrize(("axes", "window"), CASES, ids=ids)
def test_mask_marks_the_tokens_that_exist(axes, window):
    grid = Grid(*axes)
    window = whole_window(window, grid.shape)
    expected = torch.tensor([[n is not None for n in tokens] for tokens in tokens_of_windows(axes, window)])
    mask = padding_mask(window, grid, torch.device("cpu"))
    assert (mask is None) == bool(expected.all())
    if mask is not None:
        assert torch.equal(mask, expected)
        assert mask.any(1).all(), "a window without any token would have no key to attend to"
    assert counts(window, grid) == tuple(-(-a // w) for a, w in zip(axes, window, strict=True))


@pytest.mark.parametrize(("axes", "window"), CASES, ids=ids)
def test_merge_drops_what_padding_holds(axes, window):
    """Whatever an attention writes at padded places reaches no token."""
    grid = Grid(*axes)
    window = whole_window(window, grid.shape)
    x = torch.randn(2, grid.num_tokens, 3, dtype=torch.float64)
    cut = partition(x, window, grid)
    mask = padding_mask(window, grid, x.device)
    if mask is not None:
        cut = torch.where(mask.repeat(2, 1)[..., None], cut, float("nan"))
    assert torch.equal(merge(cut, window, grid), x)


def test_gradient_of_the_round_trip_is_the_identity():
    grid, window = Grid(3, 5, 7), (2, 2, 4)
    x = torch.randn(2, grid.num_tokens, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    merge(partition(x, window, grid), window, grid).backward(weight)
    assert torch.equal(x.grad, weight)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16])
def test_any_dtype_and_any_trailing_shape(dtype):
    grid, window = Grid(3, 3, 5), (2, 2, 2)
    for rest in [(), (4,), (2, 1, 3)]:
        x = torch.randint(0, 2, (2, grid.num_tokens, *rest)).to(dtype)
        cut = partition(x, window, grid)
        assert cut.dtype == dtype
        assert cut.shape == (2 * 12, 8, *rest)
        assert torch.equal(merge(cut, window, grid), x)


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ((0, 0, 0), (3, 5, 7)),
        ((1, 0, 0), (1, 5, 7)),
        ((0, 1, 1), (3, 1, 1)),
        ((2, 3, 4), (2, 3, 4)),
        ((9, 5, 8), (3, 5, 7)),
    ],
)
def test_fit(window, expected):
    assert whole_window(window, (3, 5, 7)) == expected


def test_grid():
    grid = Grid(3, 5, 7)
    assert grid.shape == (3, 5, 7)
    assert grid.num_tokens == 105
    assert grid.image_B is None
