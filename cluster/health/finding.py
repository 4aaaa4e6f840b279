"""What a check finds: a value, its limit, and what to do where the value is beyond it."""

from dataclasses import dataclass
from typing import Literal

Value = float | int | str
Verdict = Literal["pass", "fail"]


class UnfitError(Exception):
    """A check cannot give a value, and that is a fault of the node. The text says what failed and the cure."""


@dataclass(frozen=True)
class Finding:
    """One value of one check, and its limit in words."""

    what: str
    value: Value
    limit: str
    cure: str
    is_fit: bool = True

    def __str__(self) -> str:
        text = f"{self.what} {_short(self.value)}, {self.limit}"
        return text if self.is_fit else f"{text}; {self.cure}"

    def told(self) -> dict[str, Value]:
        """As it stands in the report."""
        return {
            "what": self.what,
            "value": self.value,
            "limit": self.limit,
            "verdict": "pass" if self.is_fit else "fail",
        }


def at_most(what: str, value: float, limit: float, cure: str) -> Finding:
    return Finding(what, value, f"at most {_short(limit)}", cure, value <= limit)


def at_least(what: str, value: float, limit: float, cure: str) -> Finding:
    return Finding(what, value, f"at least {_short(limit)}", cure, value >= limit)


def within(what: str, value: float, band: tuple[float, float] | None, cure: str) -> Finding:
    """Of a rate; without a band it is reported and passes."""
    if band is None:
        return Finding(what, value, "no limit known", cure, True)
    low, high = band
    return Finding(what, value, f"between {_short(low)} and {_short(high)}", cure, low <= value <= high)


def equal(what: str, value: Value, wanted: Value, cure: str) -> Finding:
    return Finding(what, value, f"must be {_short(wanted)}", cure, value == wanted)


def _short(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:.4g}" if isinstance(value, float) else str(value)
