"""Windows dealt to ranks: contiguous, whole, even; what moves between two deals; faults before any group is made."""

from __future__ import annotations

import itertools

import pytest

from parallel.dealing import (
    AnyWindow,
    Window,
    dealing_faults,
    entries,
    imbalance,
    owners,
    rank_tokens,
    runs,
    switched_tokens,
    whole_window,
    window_tokens,
)

WINDOWS: list[AnyWindow] = [
    (0, 0, 0),
    (1, 0, 0),
    (0, 1, 1),
    (2, 3, 4),
    (0, 2, 0),
    (9, 9, 9),
    ("single", 3),
    ("group", 3),
]
CASES = [(grid, window) for grid in [(1, 5, 3), (3, 5, 7), (5, 4, 6)] for window in WINDOWS]


def windows_by_loop(window: AnyWindow, grid: Window) -> list[int]:
    """The window of each token, by the definition."""
    if len(window) == 2:
        numbers = range(grid[0] * grid[1] * grid[2])
        return [n % window[1] if window[0] == "single" else n // window[1] % window[1] for n in numbers]
    t, h, w = whole_window(window, grid)
    places = list(itertools.product(*map(range, grid)))
    corners = list(itertools.product(range(0, grid[0], t), range(0, grid[1], h), range(0, grid[2], w)))
    return [corners.index((a // t * t, b // h * h, c // w * w)) for a, b, c in places]


@pytest.mark.parametrize(("grid", "window"), CASES)
def test_tokens_of_windows(grid: Window, window: AnyWindow) -> None:
    of = windows_by_loop(window, grid)
    assert window_tokens(window, grid) == [of.count(n) for n in range(max(of) + 1)]
    assert entries(window, grid) >= max(window_tokens(window, grid))


@pytest.mark.parametrize(("grid", "window"), CASES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_windows_are_whole(grid: Window, window: AnyWindow, ranks: int) -> None:
    of, found = windows_by_loop(window, grid), window_tokens(window, grid)
    assert bool(list(dealing_faults([window], grid, ranks))) == (len(found) < ranks)
    if len(found) < ranks:
        with pytest.raises(ValueError, match=f"{len(found)} windows cannot be dealt to {ranks} ranks"):
            runs(found, ranks)
        return
    owner = owners(window, grid, ranks)
    assert len({(w, o) for w, o in zip(of, owner, strict=True)}) == len(found), "a window on two ranks"
    assert rank_tokens(window, grid, ranks) == [owner.count(r) for r in range(ranks)]
    assert min(rank_tokens(window, grid, ranks)) > 0


@pytest.mark.parametrize(
    ("sizes", "ranks", "expected"),
    [
        ([1] * 8, 4, [(0, 2), (2, 4), (4, 6), (6, 8)]),
        ([1] * 5, 4, [(0, 1), (1, 2), (2, 4), (4, 5)]),
        ([9, 1, 1, 1], 2, [(0, 1), (1, 4)]),
        ([1, 1, 1, 9], 4, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        ([3, 3, 3, 1], 2, [(0, 2), (2, 4)]),
    ],
)
def test_runs(sizes: list[int], ranks: int, expected: list[tuple[int, int]]) -> None:
    assert runs(sizes, ranks) == expected


def test_no_rank_is_a_window_above_the_mean() -> None:
    for count, ranks in itertools.product(range(1, 40), range(1, 9)):
        if count >= ranks:
            most = max(last - first for first, last in runs([1] * count, ranks))
            assert most <= count / ranks + 1


def test_groups_of_a_short_clip() -> None:
    """5 tokens in groups of 4 fill the first window and begin the second: 2 ranks can have one each, 3 cannot."""
    assert window_tokens(("group", 4), (1, 5, 1)) == [4, 1, 0, 0]
    assert not list(dealing_faults([("group", 4)], (1, 5, 1), 2))
    assert rank_tokens(("group", 4), (1, 5, 1), 2) == [4, 1]
    (fault,) = dealing_faults([("group", 4)], (1, 5, 1), 3)
    assert "a window of (group, 4)" in fault
    assert "makes 2 windows, fewer than parallel.sequence=3" in fault


def test_faults_say_what_is_legal() -> None:
    found = list(dealing_faults([(1, 0, 0), (0, 0, 0), (1, 9, 9), (0, 2, 2)], (3, 5, 5), 4))
    assert found == [
        "a window of 1x5x5 on a grid of 3x5x5 tokens: makes 3 windows, fewer than parallel.sequence=4; in the kind "
        "window each rank holds at least 1 window whole; use parallel.sequence=1 to 3, or "
        "parallel.sequence_kind=ulysses, ring or ulysses_ring",
        "a window of 3x5x5 on a grid of 3x5x5 tokens: the whole clip is 1 window, fewer than parallel.sequence=4; in "
        "the kind window each rank holds at least 1 window whole; use parallel.sequence=1, or "
        "parallel.sequence_kind=ulysses, ring or ulysses_ring",
    ]


def test_imbalance() -> None:
    assert imbalance((1, 16, 16), (5, 16, 16), 4) == 1.6
    assert imbalance((5, 8, 8), (5, 16, 16), 4) == 1.0


GEOMETRIES = [
    ((5, 16, 16), (1, 16, 16), (5, 8, 8)),
    ((17, 32, 32), (1, 16, 16), (5, 8, 8)),
    ((17, 32, 32), (1, 32, 32), (17, 8, 8)),
    ((17, 32, 32), (1, 16, 16), (17, 8, 8)),
]


@pytest.mark.parametrize(("grid", "space", "time"), GEOMETRIES)
@pytest.mark.parametrize("cores", [2, 3, 4], ids=["text keys", "own keys in one block", "own keys in both"])
def test_a_pair_of_blocks_moves_at_most_27_hundredths_of_ulysses(
    grid: Window, space: Window, time: Window, cores: int
) -> None:
    """On 4 ranks, in tokens of width D: twice the switch, against q, k, v and the output of each core."""
    ranks, tokens = 4, grid[0] * grid[1] * grid[2]
    moved = switched_tokens(space, time, grid, ranks) + switched_tokens(time, space, grid, ranks)
    ulysses = cores * 4 * tokens * (ranks - 1) / ranks
    assert 0 < moved <= 0.27 * ulysses
