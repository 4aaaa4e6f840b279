"""Long lists for a report, such as the clips that are left out and why: entries are made when they are looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Generic, TypeVar

T = TypeVar("T")
MAX_LISTED = 1000
"""Entries that a report names; of more it says how many there are."""


class Listing(Generic[T]):
    """Entries one after another, each of a list or computed from its number: ``len``, iteration, ``+``, ``==``."""

    def __init__(self, *parts: tuple[int, Callable[[int], T]]) -> None:
        self._parts = tuple(part for part in parts if part[0])

    @classmethod
    def of(cls, entries: Iterable[T]) -> Listing[T]:
        held = tuple(entries)
        return cls((len(held), held.__getitem__))

    def __len__(self) -> int:
        return sum(num for num, _ in self._parts)

    def __iter__(self) -> Iterator[T]:
        return (entry(number) for num, entry in self._parts for number in range(num))

    def __add__(self, other: Listing[T] | Sequence[T]) -> Listing[T]:
        more = other if isinstance(other, Listing) else Listing.of(other)
        return Listing(*self._parts, *more._parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Listing | list | tuple) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Listing of {len(self)}: {list(islice(self, 3))}"

    @property
    def first(self) -> T:
        """The first entry; IndexError without any."""
        return self._parts[0][1](0)

    def report(self, name: str) -> dict[str, Any]:
        """As JSON, the first ones under ``name``; their number, where there are more, under ``num_<name>``."""
        listed = list(islice(self, MAX_LISTED))
        return {name: listed} if len(listed) == len(self) else {name: listed, f"num_{name}": len(self)}


def number_of(report: dict[str, Any], name: str) -> int:
    """How many entries a listing had that was reported under ``name``."""
    return int(report.get(f"num_{name}", len(report[name])))
