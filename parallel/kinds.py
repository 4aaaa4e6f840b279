"""The kinds of sequence parallelism: which a model can have, and which it should. Arithmetic only, no torch.

| kind         | what travels in a layer, of n ranks                        | needs                                    |
|--------------|------------------------------------------------------------|------------------------------------------|
| window       | nothing; the residual stream once where the window changes | as many windows as ranks in every layer  |
| ulysses      | q, k, v and the output, (n - 1) / n of a rank's share      | heads / tensor divisible by n            |
| ulysses_ring | Ulysses inside a node, a ring across nodes                 | heads / tensor divisible by `ulysses`    |
| ring         | k and v of every other rank, beside the arithmetic         | nothing                                  |

Papers: DeepSpeed-Ulysses 2309.14509, Ring Attention 2310.01889, the two combined 2405.07719.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Literal

from parallel.dealing import AnyWindow, Window, dealing_faults, imbalance
from parallel.layout import Layout, divisors, words

SequenceKind = Literal["ulysses", "ring", "ulysses_ring", "window"]

# The fullest rank over the mean above which waiting for it costs more than the exchanges that `window` saves.
MOST_IMBALANCE = 1.3


def choose_kind(
    layout: Layout,
    num_heads: int,
    windows: Iterable[AnyWindow],
    grids: Iterable[Window],
    ranks_per_node: int | None = None,
) -> SequenceKind:
    """What `auto` means for windows of all layers on the grids of all clips.

    `window` where every window of every grid can be whole on a rank and no rank holds more than MOST_IMBALANCE times
    the mean; else `ulysses` where the heads divide; else `ulysses_ring` where some ranks can share heads; else `ring`.
    """
    ranks, windows, grids = layout.sequence, list(windows), list(grids)
    if not any(fault for grid in grids for fault in dealing_faults(windows, grid, ranks)):
        worst = max((imbalance(window, grid, ranks) for grid in grids for window in windows), default=math.inf)
        if worst <= MOST_IMBALANCE:
            return "window"
    if not list(layout.ulysses_faults(num_heads)):
        return "ulysses"
    return "ulysses_ring" if ulysses_degree(layout, num_heads, ranks_per_node) > 1 else "ring"


def ulysses_degree(layout: Layout, num_heads: int, ranks_per_node: int | None = None) -> int:
    """How many neighbours share heads in the kind ulysses_ring: the most that heads and a node allow."""
    return math.gcd(layout.sequence, num_heads // layout.tensor, _places(layout, ranks_per_node))


def sequence_faults(
    kind: SequenceKind,
    layout: Layout,
    num_heads: int,
    windows: Iterable[AnyWindow],
    grids: Iterable[Window],
    ulysses: int = 0,
    ranks_per_node: int | None = None,
) -> Iterator[str]:
    """What keeps a model from the kind; `ulysses` is the degree wanted in ulysses_ring, 0 for `ulysses_degree`."""
    if layout.sequence == 1:
        return
    if kind == "window":
        windows = list(windows)
        for grid in dict.fromkeys(grids):
            yield from dealing_faults(windows, grid, layout.sequence)
    elif kind == "ulysses":
        yield from layout.ulysses_faults(num_heads)
    elif kind == "ulysses_ring" and ulysses:
        yield from _combined_faults(layout, num_heads, ulysses, ranks_per_node)


def _combined_faults(layout: Layout, num_heads: int, ulysses: int, ranks_per_node: int | None) -> Iterator[str]:
    most = ulysses_degree(layout, num_heads, ranks_per_node)
    if most % ulysses:
        node = "" if ranks_per_node is None else f" and {_places(layout, ranks_per_node)} places in a node"
        yield (
            f"parallel.ulysses={ulysses} must divide parallel.sequence={layout.sequence} and "
            f"{num_heads // layout.tensor} heads (of {num_heads}, tensor {layout.tensor}){node}; "
            f"use one of {words(divisors(most))}"
        )


def _places(layout: Layout, ranks_per_node: int | None) -> int:
    """Ranks of one sequence group in one node; all of them where nodes are not known."""
    if ranks_per_node is None:
        return layout.sequence
    return max(1, ranks_per_node // layout.tensor)
