"""What can be checked of a streamed run afterwards: that its record agrees with itself.

Without an index nobody knows which clips there are, so there is no order to hold the record against. What can be said
is that each step's clips come from the tars that its line names, that no clip of a tar was given twice in an epoch
(but where a resume read tars again), and that the counts of each epoch are the sums of its steps.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vidit.data.stream_plan import Counts
from vidit.data.stream_tars import Tars


@dataclass
class StreamAudit:
    """What a streamed run's record says; `fault` is the first place where it contradicts itself."""

    tars: Tars
    held_out: int
    steps: int = 0
    fault: str = ""
    places: dict[int, Counts] = field(default_factory=dict)
    seen: dict[int, set[str]] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        yield f"{self.steps} steps; {len(self.tars)} tars that were streamed, {self.held_out} clips for validation"
        yield "a streamed run has no order to be held against: what its record says of itself is compared"
        for number in sorted({place // len(self.tars) + 1 for place in self.places}):
            delivered, skipped, too_short, refused = self._sum(number)
            yield (
                f"epoch {number}: {delivered} delivered, {skipped} skipped, {too_short} too short; "
                f"{refused} tars refused"
            )
        for name, reason in self.skipped[:20]:
            yield f"skipped: {name}: {reason}"
        if len(self.skipped) > 20:
            yield f"and {len(self.skipped) - 20} more, which metrics.jsonl names"
        yield self.fault or "the record agrees with itself: no clip was given twice in an epoch, and the sums are right"

    def add(self, row: Mapping[str, Any]) -> str:
        """Enter the line of a step; what is wrong with it, or nothing."""
        self.steps += 1
        if (again := row.get("read_again_from")) is not None:
            for place in [place for place in self.places if place >= again]:
                del self.places[place]
                self.seen.pop(place, None)
        taken = {int(place): Counts(*counts) for place, *counts in row["tars"]}
        for place, counts in taken.items():
            self.places[place] = self.places.get(place, Counts()) + counts
        lost, short = row["skipped"], row.get("too_short", [])
        self.skipped += lost
        delivered, skipped, too_short, refused = _total(taken.values())
        if (delivered, skipped + refused, too_short) != (len(row["keys"]), len(lost), len(short)):
            return (
                f"step {row['step']} names {len(row['keys'])} clips, {len(lost)} skipped and {len(short)} too short, "
                f"and its tars count {delivered}, {skipped + refused} and {too_short}"
            )
        for name in (*row["keys"], *(name for name, _ in (*lost, *short))):
            if not self._is_new(name, taken):
                return f"step {row['step']} gives {name}, which its tars do not hold or gave before in this epoch"
        for epoch in row.get("epochs", []):
            known = self._sum(epoch["number"])._asdict()
            if {name: epoch[name] for name in known} != known:
                return f"epoch {epoch['number']} ends at step {row['step']} with {epoch}; its steps count {known}"
            for place in range((epoch["number"] - 1) * len(self.tars), epoch["number"] * len(self.tars)):
                self.seen.pop(place, None)
        return ""

    def _is_new(self, name: str, places: Mapping[int, Counts]) -> bool:
        for place in places:
            tar, seen = self.tars.name(place), self.seen.setdefault(place, set())
            if (name == tar or name.startswith(f"{tar}/")) and name not in seen:
                seen.add(name)
                return True
        return False

    def _sum(self, number: int) -> Counts:
        return _total(counts for place, counts in self.places.items() if place // len(self.tars) + 1 == number)


def _total(all_counts: Iterable[Counts]) -> Counts:
    return sum(all_counts, Counts())


def audit_stream(rows: Sequence[Mapping[str, Any]], tars: Tars, held_out: int) -> StreamAudit:
    """Of the lines of all steps, up to the first fault. ValueError for a line that no streamed run has written."""
    found = StreamAudit(tars, held_out)
    for row in rows:
        try:
            found.fault = found.add(row)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"step {row['step']} of metrics.jsonl is damaged in what it says of tars ({type(error).__name__}: "
                f"{error}); restore it from a copy"
            ) from error
        if found.fault:
            break
    return found
