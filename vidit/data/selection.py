"""Rules over stored scores: which clips of a data set a run trains on.

A rule is text: ``motion >= 0.5``, ``brightness in 20..235``, ``motion >= q0.25`` (a quantile of this data set),
``cuts == 0``, ``duplicate_of is none``. A clip is kept when every rule holds. Pure and without torch, so that a
login node can check the rules of a config.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Score = float | str | None
Column = Sequence[Score]

_NAME = r"(?P<name>[A-Za-z_]\w*)"
_NUMBER = r"q?[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_COMPARE = re.compile(rf"\s*{_NAME}\s*(?P<op>>=|<=|==|!=|>|<)\s*(?P<bound>{_NUMBER})\s*")
_RANGE = re.compile(rf"\s*{_NAME}\s+in\s+(?P<low>(?:{_NUMBER})?)\s*\.\.\s*(?P<high>{_NUMBER})\s*")
_NONE = re.compile(rf"\s*{_NAME}\s+is\s+(?P<no>not\s+)?none\s*")
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
GRAMMAR = "write `score >= 0.5` (or > < <= == !=), `score in 20..235`, `score >= q0.25`, or `score is none`"


@dataclass(frozen=True, slots=True)
class Bound:
    """A number, or a quantile (0 to 1) of the data set's own scores."""

    value: float
    is_quantile: bool

    def among(self, sorted_values: Sequence[float]) -> float:
        """The number; a quantile lies between its neighbours, in proportion, as numpy's default has it."""
        if not self.is_quantile:
            return self.value
        place = self.value * (len(sorted_values) - 1)
        low, high = sorted_values[math.floor(place)], sorted_values[math.ceil(place)]
        return low + (high - low) * (place - math.floor(place))


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule that is parsed. ``kind``: an operator, "in" with two bounds, "is" or "is not" with none."""

    text: str
    name: str
    kind: str
    bounds: tuple[Bound, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one rule does alone, whatever the others do."""

    rule: Rule
    limits: tuple[float, ...]
    """Its bounds as numbers, quantiles worked out."""
    keeps: tuple[bool, ...]
    """Per clip."""
    only: int
    """Clips that no other rule drops."""

    @property
    def num_dropped(self) -> int:
        return self.keeps.count(False)

    def line(self) -> str:
        """For a log: the rule, its limits, how many it drops."""
        limits = f" (that is {', '.join(f'{x:g}' for x in self.limits)})" if _has_quantile(self.rule) else ""
        drops = f"drops {self.num_dropped} of {len(self.keeps)} clips, {self.only} of them alone"
        return f"select {self.rule.text}{limits}: {drops if self.num_dropped else 'drops no clip'}"


@dataclass(frozen=True, slots=True)
class Selection:
    """``keep`` has one entry a clip."""

    keep: tuple[bool, ...]
    verdicts: tuple[Verdict, ...]

    def reason(self, place: int) -> str:
        """The rules that drop a clip; empty for one that is kept."""
        return "; ".join(f"not {verdict.rule.text}" for verdict in self.verdicts if not verdict.keeps[place])


def parse_rule(text: str) -> Rule:
    """Raises ValueError, with the grammar, for what is no rule."""
    if found := _COMPARE.fullmatch(text):
        bounds: tuple[Bound, ...] = (_bound(text, found["bound"]),)
        return Rule(text.strip(), found["name"], found["op"], bounds)
    if found := _RANGE.fullmatch(text):
        if not found["low"]:
            raise ValueError(f"rule {text!r}: a range has two ends; write `{found['name']} <= {found['high']}`")
        bounds = (_bound(text, found["low"]), _bound(text, found["high"]))
        if bounds[0].is_quantile == bounds[1].is_quantile and bounds[0].value > bounds[1].value:
            raise ValueError(f"rule {text!r}: {found['low']} is above {found['high']}; write the lower end first")
        return Rule(text.strip(), found["name"], "in", bounds)
    if found := _NONE.fullmatch(text):
        return Rule(text.strip(), found["name"], "is not" if found["no"] else "is")
    raise ValueError(f"rule {text!r} is not understood; {GRAMMAR}")


def _bound(text: str, token: str) -> Bound:
    value, is_quantile = float(token.removeprefix("q")), token.startswith("q")
    if is_quantile and not 0 <= value <= 1:
        raise ValueError(f"rule {text!r}: {token} is no quantile; use q0 to q1")
    return Bound(value, is_quantile)


def rule_faults(rules: Sequence[str]) -> list[str]:
    """What is wrong with the text of rules, one line each; no scores are needed."""
    faults = []
    for text in rules:
        try:
            parse_rule(text)
        except ValueError as error:
            faults.append(str(error))
    return faults


def select(scores: Mapping[str, Column], rules: Sequence[str]) -> Selection:
    """Apply rules to columns of scores, each with one entry a clip.

    Raises ValueError for a rule that is malformed, names no score, compares a text, or drops every clip, and for
    rules that together drop every clip.
    """
    num_clips = len(next(iter(scores.values()), ()))
    judged = [_judged(scores, parse_rule(text)) for text in rules]
    drops = [sum(not keeps[place] for _, _, keeps in judged) for place in range(num_clips)]
    verdicts = tuple(
        Verdict(rule, limits, keeps, sum(not kept and count == 1 for kept, count in zip(keeps, drops, strict=True)))
        for rule, limits, keeps in judged
    )
    if num_clips and all(drops):
        counts = "; ".join(verdict.line() for verdict in verdicts)
        raise ValueError(f"the rules of data.select together drop all {num_clips} clips; loosen one: {counts}")
    return Selection(tuple(count == 0 for count in drops), verdicts)


def _judged(scores: Mapping[str, Column], rule: Rule) -> tuple[Rule, tuple[float, ...], tuple[bool, ...]]:
    if rule.name not in scores:
        near = difflib.get_close_matches(rule.name, scores, 3, 0.4)
        hint = f"nearest: {', '.join(near)}" if near else f"there are {', '.join(sorted(scores))}"
        raise ValueError(f"rule {rule.text!r}: no score {rule.name!r}; {hint}")
    column = scores[rule.name]
    if rule.kind in ("is", "is not"):
        limits: tuple[float, ...] = ()
        keeps = tuple((value is None) == (rule.kind == "is") for value in column)
    else:
        limits, keeps = _compared(_numbers(rule, column), rule)
    if column and not any(keeps):
        present = [value for value in column if isinstance(value, int | float)]
        span = f"; {rule.name} lies between {min(present):g} and {max(present):g}" if present else ""
        raise ValueError(f"rule {rule.text!r} drops all {len(column)} clips{span}")
    return rule, limits, keeps


def _numbers(rule: Rule, column: Column) -> list[float]:
    numbers = []
    for value in column:
        if isinstance(value, str) or value is None:
            raise ValueError(f"rule {rule.text!r}: {rule.name} is no number; write `{rule.name} is none`")
        numbers.append(value)
    return numbers


def _compared(numbers: list[float], rule: Rule) -> tuple[tuple[float, ...], tuple[bool, ...]]:
    ascending = sorted(numbers)
    limits = tuple(bound.among(ascending) for bound in rule.bounds) if numbers else ()
    if rule.kind == "in":
        return limits, tuple(limits[0] <= value <= limits[1] for value in numbers)
    compare = _OPERATORS[rule.kind]
    return limits, tuple(compare(value, limits[0]) for value in numbers)


def _has_quantile(rule: Rule) -> bool:
    return any(bound.is_quantile for bound in rule.bounds)
