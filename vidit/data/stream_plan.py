"""Where the readers of a stream stand: what a batch says of it, what a checkpoint keeps, and where a resume begins.

With as many readers as before each goes on where it was. With another number all begin at the first place that not
all readers have finished, so no clip is left out, and what some had read beyond it is read again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vidit.data.stream_reader import Position


class Counts(NamedTuple):
    """Of the clips of one place: those delivered, those that could not be used, those too short, and whether the tar
    was refused.
    """

    delivered: int = 0
    skipped: int = 0
    too_short: int = 0
    refused: int = 0

    def __add__(self, other: tuple[int, ...]) -> "Counts":  # type: ignore[override]
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass
class Mark:
    """What a batch took from its reader: counts by place, (name, reason) of clips that are too short; and where the
    reader stands behind it.
    """

    reader: int
    position: Position
    counts: dict[int, Counts] = field(default_factory=dict)
    too_short: list[tuple[str, str]] = field(default_factory=list)

    def count(self, place: int, **what: int) -> None:
        self.counts[place] = self.counts.get(place, Counts()) + Counts(**what)

    def told(self) -> list[Any]:
        """As JSON."""
        counts = [[place, *counts] for place, counts in sorted(self.counts.items())]
        return [self.reader, list(self.position), counts, self.too_short]

    @classmethod
    def heard(cls, told: list[Any]) -> "Mark":
        reader, position, counts, too_short = told
        by_place = {int(place): Counts(*rest) for place, *rest in counts}
        return cls(int(reader), Position(*position), by_place, [(name, reason) for name, reason in too_short])


@dataclass(frozen=True)
class Plan:
    """The position of each reader; reader r reads the places r mod their number, from the first one of all on."""

    positions: tuple[Position, ...]

    @property
    def readers(self) -> int:
        return len(self.positions)

    @property
    def unfinished(self) -> int:
        """The first place that not all readers have finished."""
        return min(position.place for position in self.positions)


def begin(readers: int, place: int = 0) -> Plan:
    """All readers at the front of their first tars, from a place on."""
    return Plan(tuple(Position(place + reader) for reader in range(readers)))


def resumed(facts: Mapping[str, Any], readers: int, tars: int) -> tuple[Plan, str]:
    """Where `readers` go on from what a checkpoint keeps (`StreamAccount.facts`), and what to tell the user of that."""
    held = Plan(tuple(Position(*position) for position in facts["positions"]))
    if held.readers == readers:
        clips = sum(position.ordinal + position.delivered for position in held.positions)
        return held, (
            f"{readers} readers go on where they were: each reads its tar again from the front, and {clips} clips are "
            "passed over"
        )
    place = held.unfinished
    again = sum(_begun(position, place, held.readers) for position in held.positions)
    return begin(readers, place), (
        f"{readers} readers instead of {held.readers}: all begin at tar {place % tars + 1} of epoch "
        f"{place // tars + 1}, the first that was not finished, and {again} tars are read again, from the front"
    )


def _begun(position: Position, place: int, stride: int) -> int:
    """The tars that a reader has begun from a place on: every `stride`-th up to its own."""
    finished = (position.place - place) // stride
    return finished + (1 if position.ordinal or position.delivered else 0)
