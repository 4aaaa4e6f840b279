"""Patterns over dotted names, matched strictly.

`*` stands for one part of a name: `blocks.*.attn.query.*` is the weight and the bias of every block's query.
A plan that misses a parameter, or names one that is not there, is an error and not a silent default.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import nn

T = TypeVar("T")


class PlanError(ValueError):
    """A plan that does not fit the module it is applied to."""


def compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(r"[^.]+".join(re.escape(part) for part in pattern.split("*")))


def match(plan: Mapping[str, T], names: Iterable[str], what: str) -> dict[str, T]:
    """name -> value of the one pattern that fits it.

    Raises PlanError where a name fits no pattern or several, or a pattern fits no name; `what` says in the message
    what the names are.
    """
    expressions = {pattern: compiled(pattern) for pattern in plan}
    found: dict[str, T] = {}
    unused = set(plan)
    for name in names:
        fitting = [pattern for pattern, expression in expressions.items() if expression.fullmatch(name)]
        if len(fitting) != 1:
            said = f"{len(fitting)} patterns ({', '.join(fitting)})" if fitting else f"none of {len(plan)} patterns"
            raise PlanError(f"{what} {name} fits {said} of the plan; it must fit exactly 1: add or narrow a pattern")
        unused.discard(fitting[0])
        found[name] = plan[fitting[0]]
    if unused:
        raise PlanError(
            f"{len(unused)} of {len(plan)} patterns fit no {what}: {', '.join(sorted(unused))}; "
            "each must fit at least 1: remove or correct them"
        )
    return found


def modules(root: nn.Module, patterns: Iterable[str]) -> dict[str, nn.Module]:
    """name -> module for every pattern, in the order of the module tree. Raises PlanError as `match` does."""
    by_name = dict(root.named_modules())
    expressions = {pattern: compiled(pattern) for pattern in patterns}
    chosen = {name: m for name, m in by_name.items() if any(e.fullmatch(name) for e in expressions.values())}
    match(dict.fromkeys(expressions, True), chosen, "module")
    return chosen
