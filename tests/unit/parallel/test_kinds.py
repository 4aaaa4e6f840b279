"""What `auto` chooses, and what keeps a model from a kind."""

from __future__ import annotations

from typing import Any

import pytest

from parallel.kinds import choose_kind, sequence_faults, ulysses_degree
from parallel.layout import Layout

GRID, PAIR = (8, 16, 16), ((1, 0, 0), (0, 8, 8))
FULL = ((0, 0, 0),)


@pytest.mark.parametrize(
    ("layout", "heads", "windows", "grids", "node", "expected"),
    [
        ({"sequence": 4}, 6, PAIR, [GRID], None, "window"),
        ({"sequence": 4}, 8, PAIR, [GRID, (1, 16, 16)], None, "ulysses"),  # an image is one window
        ({"sequence": 4}, 8, PAIR, [(5, 16, 16)], None, "ulysses"),  # 2 of 5 frames on a rank
        ({"sequence": 4}, 8, FULL, [GRID], None, "ulysses"),
        ({"sequence": 4, "tensor": 4}, 8, FULL, [GRID], None, "ulysses_ring"),  # 2 heads left
        ({"sequence": 8}, 12, FULL, [GRID], None, "ulysses_ring"),
        ({"sequence": 4}, 3, FULL, [GRID], None, "ring"),
        ({"sequence": 16}, 24, FULL, [GRID], 1, "ring"),  # a node has one place
    ],
)
def test_auto(layout: Any, heads: int, windows: Any, grids: Any, node: int | None, expected: str) -> None:
    kind = choose_kind(Layout(**layout), heads, windows, grids, node)
    assert kind == expected
    assert list(sequence_faults(kind, Layout(**layout), heads, windows, grids, 0, node)) == []


@pytest.mark.parametrize(
    ("layout", "heads", "node", "expected"),
    [
        (Layout(sequence=8), 24, None, 8),
        (Layout(sequence=8), 12, None, 4),
        (Layout(sequence=16), 32, 8, 8),
        (Layout(sequence=16, tensor=4), 32, 8, 2),
        (Layout(sequence=4), 3, None, 1),
        (Layout(sequence=4, tensor=8), 8, 8, 1),
    ],
)
def test_as_many_as_heads_and_node_allow(layout: Layout, heads: int, node: int | None, expected: int) -> None:
    assert ulysses_degree(layout, heads, node) == expected


@pytest.mark.parametrize(
    ("kind", "layout", "heads", "ulysses", "node", "fault"),
    [
        ("window", Layout(sequence=9), 8, 0, None, "a window of 1x16x16 on a grid of 8x16x16 tokens: makes 8 windows"),
        ("window", Layout(sequence=1), 8, 0, None, ""),
        ("ulysses", Layout(sequence=4), 6, 0, None, "6 heads are not divisible by parallel.sequence=4"),
        ("ring", Layout(sequence=64), 1, 0, None, ""),
        ("ulysses_ring", Layout(sequence=8), 12, 4, None, ""),
        (
            "ulysses_ring", Layout(sequence=8, tensor=2), 12, 4, None,
            "parallel.ulysses=4 must divide parallel.sequence=8 and 6 heads (of 12, tensor 2); use one of 1 2",
        ),
        (
            "ulysses_ring", Layout(sequence=8), 8, 8, 4,
            "parallel.ulysses=8 must divide parallel.sequence=8 and 8 heads (of 8, tensor 1) and 4 places in a node; "
            "use one of 1 2 4",
        ),
    ],
)  # fmt: skip
def test_faults(kind: Any, layout: Layout, heads: int, ulysses: int, node: int | None, fault: str) -> None:
    found = list(sequence_faults(kind, layout, heads, PAIR, [GRID, GRID], ulysses, node))
    assert len(found) == bool(fault) * (2 if kind == "window" else 1)  # a window of space, one of space-time
    assert all(fault in found[0] for _ in found)


def test_every_grid_is_asked() -> None:
    found = list(sequence_faults("window", Layout(sequence=2), 8, PAIR, [GRID, (1, 16, 16)]))
    assert len(found) == 1
    assert "on a grid of 1x16x16 tokens: the whole clip is 1 window" in found[0]
