"""Patterns over names: one part a star, each name once, each pattern used."""

from __future__ import annotations

import pytest
from torch import nn

from parallel.names import PlanError, match, modules

NAMES = ["blocks.0.attn.query.weight", "blocks.1.attn.query.weight", "blocks.1.attn.query.bias", "head.weight"]


def test_one_part() -> None:
    found = match({"blocks.*.attn.query.*": 1, "head.weight": 2}, NAMES, "parameter")
    assert found == {**dict.fromkeys(NAMES[:3], 1), "head.weight": 2}


def test_a_dot_is_a_dot() -> None:
    with pytest.raises(PlanError, match="headxweight fits none"):
        match({"head.weight": 1}, ["headxweight"], "parameter")


@pytest.mark.parametrize(
    ("plan", "fault"),
    [
        ({"blocks.*.attn.query.*": 1}, "parameter head.weight fits none of 1 patterns"),
        ({"blocks.*.attn.query.*": 1, "head.*": 1, "*.weight": 1}, r"fits 2 patterns \(head.\*, \*.weight\)"),
        ({"blocks.*.attn.query.*": 1, "head.*": 1, "tail": 1}, "1 of 3 patterns fit no parameter: tail"),
        ({"blocks.*": 1, "head.*": 1}, "fits none of 2 patterns"),
    ],
)
def test_faults(plan: dict[str, int], fault: str) -> None:
    with pytest.raises(PlanError, match=fault):
        match(plan, NAMES, "parameter")


def test_modules() -> None:
    tree = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.GELU()), "b": nn.Linear(2, 2)})
    assert list(modules(tree, ["a.*", "b"])) == ["a.0", "a.1", "b"]
    with pytest.raises(PlanError, match="fit no module: c"):
        modules(tree, ["a.*", "c"])
