"""Windows dealt to ranks: which rank owns which windows and how many tokens, from the config alone, without torch.

Windows are numbered along time, then height, then width; the last of an axis is short where it does not divide the
grid. Ranks own contiguous runs of them, as even in tokens as whole windows allow. A window is (time, height, width),
0 for the whole axis, clamped to the grid; a grid is the tokens of a whole clip.

Or a window skips: of the tokens, numbered through the clip, (single, k) takes every k-th, (group, k) every k-th group
of k. There are k of them, the last ones short, or empty, where k^2 does not divide the clip.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, product
from typing import Any, Literal, TypeVar, overload

N = TypeVar("N", bound=Any)
Window = tuple[int, int, int]
Skip = tuple[Literal["single", "group"], int]
AnyWindow = Window | Skip
"""Three numbers, or a pair that skips."""


@overload
def whole_window(window: Window, grid: Window) -> Window: ...
@overload
def whole_window(window: AnyWindow, grid: Window) -> AnyWindow: ...
def whole_window(window: AnyWindow, grid: Window) -> AnyWindow:
    """0 replaced by the axis, and what is larger than the grid by the grid."""
    if len(window) == 2:
        return window
    t, h, w = (min(size, axis) or axis for size, axis in zip(window, grid, strict=True))
    return t, h, w


def entries(window: AnyWindow, grid: Window) -> int:
    """Places in a window, those past the grid included."""
    if len(window) == 2:
        k = window[1]
        return -(-grid[0] * grid[1] * grid[2] // (k * k)) * k
    t, h, w = whole_window(window, grid)
    return t * h * w


def skipped_to(number: N, skip: Skip) -> N:
    """The window of the token of that number, or of those numbers."""
    kind, k = skip
    found: N = number % k if kind == "single" else number // k % k
    return found


def window_tokens(window: AnyWindow, grid: Window) -> list[int]:
    """Tokens of each window, padding not counted, in the order of windows."""
    if len(window) == 2:
        found = Counter(skipped_to(number, window) for number in range(grid[0] * grid[1] * grid[2]))
        return [found[place] for place in range(window[1])]
    sizes = (
        [min(size, axis - first) for first in range(0, axis, size)]
        for size, axis in zip(whole_window(window, grid), grid, strict=True)
    )
    return [t * h * w for t, h, w in product(*sizes)]


def runs(sizes: Sequence[int], ranks: int) -> list[tuple[int, int]]:
    """[first, last) window of each rank: each cut is the one nearest to an even share that leaves a window a rank.

    Raises ValueError where there are fewer windows than ranks.
    """
    if len(sizes) < ranks:
        raise ValueError(
            f"{len(sizes)} windows cannot be dealt to {ranks} ranks: each needs 1 of its own; use at most {len(sizes)}"
        )
    before = [0, *accumulate(sizes)]
    cuts = [0]
    for rank in range(1, ranks):
        legal = range(cuts[-1] + 1, len(sizes) - (ranks - rank) + 1)
        share = rank * before[-1] / ranks
        cuts.append(min(legal, key=lambda cut: abs(before[cut] - share)))
    return list(zip(cuts, [*cuts[1:], len(sizes)], strict=True))


def rank_tokens(window: AnyWindow, grid: Window, ranks: int) -> list[int]:
    """Tokens of each rank in front of a block with this window: the shapes that pipeline stages hand on."""
    sizes = window_tokens(window, grid)
    return [sum(sizes[first:last]) for first, last in runs(sizes, ranks)]


def imbalance(window: AnyWindow, grid: Window, ranks: int) -> float:
    """Tokens of the fullest rank over the mean: every other rank waits for it."""
    tokens = rank_tokens(window, grid, ranks)
    return max(tokens) * ranks / sum(tokens)


def dealing_faults(windows: Iterable[AnyWindow], grid: Window, ranks: int) -> Iterator[str]:
    """What keeps the windows of `grid` from being whole on one of `ranks` ranks each."""
    for window in dict.fromkeys(whole_window(w, grid) for w in windows):
        found = sum(size > 0 for size in window_tokens(window, grid))
        if found < ranks:
            what = "the whole clip is 1 window" if found == 1 else f"makes {found} windows"
            yield (
                f"a window of {_by(window)} on a grid of {_by(grid)} tokens: {what}, fewer than "
                f"parallel.sequence={ranks}; in the kind window each rank holds at least 1 window whole; use "
                f"parallel.sequence={'1' if found == 1 else f'1 to {found}'}, or parallel.sequence_kind=ulysses, ring "
                "or ulysses_ring"
            )


def switched_tokens(before: AnyWindow, after: AnyWindow, grid: Window, ranks: int) -> int:
    """Tokens of one clip that change their rank between blocks with these two windows."""
    old, new = owners(before, grid, ranks), owners(after, grid, ranks)
    return sum(a != b for a, b in zip(old, new, strict=True))


def owners(window: AnyWindow, grid: Window, ranks: int) -> list[int]:
    """The rank of every token of the clip, time first."""
    size = whole_window(window, grid)
    if len(size) == 2:
        dealt = [
            r for r, (first, last) in enumerate(runs(window_tokens(size, grid), ranks)) for _ in range(first, last)
        ]
        return [dealt[skipped_to(number, size)] for number in range(grid[0] * grid[1] * grid[2])]
    _, rows, columns = (-(-axis // s) for axis, s in zip(grid, size, strict=True))
    of = [r for r, (first, last) in enumerate(runs(window_tokens(window, grid), ranks)) for _ in range(first, last)]
    places = product(*(range(axis) for axis in grid))
    return [of[(t // size[0] * rows + h // size[1]) * columns + w // size[2]] for t, h, w in places]


def _by(sizes: AnyWindow) -> str:
    return f"({sizes[0]}, {sizes[1]})" if len(sizes) == 2 else "x".join(str(size) for size in sizes)
