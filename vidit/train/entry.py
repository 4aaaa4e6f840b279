"""What an account says of a step: fields for its line in metrics.jsonl, and lines for the person at the terminal."""

from collections.abc import Callable
from typing import Any, NamedTuple

from vidit.data.account import Account
from vidit.train.fetch import Fetched


class Entry(NamedTuple):
    """Of one step."""

    row: dict[str, Any]
    lines: list[str]


def by_order(account: Account | None) -> Callable[[int, Fetched], Entry]:
    """Enter each step into an account that knows the order of the clips; ranks that do not report have none."""

    def enter(step: int, fetched: Fetched) -> Entry:
        ended = account.add(step, fetched.keys, fetched.skipped) if account else []
        row = {"epochs": [epoch.as_dict() for epoch in ended]} if ended else {}
        return Entry(row, [epoch.line() for epoch in ended])

    return enter
