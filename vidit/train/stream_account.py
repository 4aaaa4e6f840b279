"""Where the clips of a stream went, and where its readers are: what the checkpoints of a streamed run keep.

No index says which clips there are, so there is no order to hold a step against. What the readers say of each tar is
summed: a place is closed when every reader is beyond it, and an epoch when all its places are. Every rank keeps
this account, of all readers, so any may stop the run by it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vidit.data.stream_loader import StreamBatches
from vidit.data.stream_plan import Counts, Mark
from vidit.train.entry import Entry
from vidit.train.fetch import Fetched
from vidit.train.skips import SkipLimitError


class StreamAccount:
    """Goes on from `held`, the facts of a checkpoint, or from nothing; writes `facts["stream"]` after each step.

    With another number of readers than before, the counts of tars that are not closed begin anew, as the tars do.
    """

    def __init__(self, stream: StreamBatches, facts: dict[str, Any], held: Mapping[str, Any]):
        self.tars, self.limit, self.facts = stream.tars, stream.data.max_skipped, facts
        self.positions = list(stream.plan.positions)
        self.open: dict[int, Counts] = {}
        self.epochs = {int(number): Counts(*counts) for number, *counts in held.get("epochs", [])}
        self.begun, self.refused = (int(held.get(name, 0)) for name in ("begun", "refused"))
        self.again: int | None = None
        if held and len(held["positions"]) == len(self.positions):
            self.open = {int(place): Counts(*counts) for place, *counts in held["open"]}
        elif held:
            self.again = stream.plan.unfinished
            self.begun -= len(held["open"])
            self.refused -= sum(counts[-1] for counts in held["open"])

    def enter(self, step: int, fetched: Fetched) -> Entry:
        """Take what a step was given. SkipLimitError where too many tars were refused, on every rank."""
        for mark in fetched.marks:
            self._take(mark)
        self._judge()
        ended = self._close()
        counts: dict[int, Counts] = {}
        for mark in fetched.marks:
            for place, taken in mark.counts.items():
                counts[place] = counts.get(place, Counts()) + taken
        row: dict[str, Any] = {"tars": [[place, *taken] for place, taken in sorted(counts.items())]}
        if too_short := [entry for mark in fetched.marks for entry in mark.too_short]:
            row["too_short"] = too_short
        if self.again is not None:
            row["read_again_from"], self.again = self.again, None
        if ended:
            row["epochs"] = [{"number": number, "tars": len(self.tars), **of._asdict()} for number, of in ended]
        self.facts["stream"] = {
            "positions": [list(position) for position in self.positions], "open": _rows(self.open),
            "epochs": _rows(self.epochs), "begun": self.begun, "refused": self.refused,
        }  # fmt: skip
        return Entry(row, [self._line(number, of) for number, of in ended])

    def _take(self, mark: Mark) -> None:
        self.positions[mark.reader] = mark.position
        for place, taken in mark.counts.items():
            self.begun += place not in self.open
            self.refused += taken.refused
            self.open[place] = self.open.get(place, Counts()) + taken

    def _judge(self) -> None:
        """A tar counts as a clip among clips, which many refused tars could hide in."""
        if self.limit and self.refused > max(1.0, self.limit * self.begun):
            last = max(place for place, counts in self.open.items() if counts.refused)
            raise SkipLimitError(
                f"{self.refused} of {self.begun} tars could not be read to their end, more than data.max_skipped="
                f"{self.limit:g} allows, {self.tars.name(last)} among them. Restore them, or raise data.max_skipped"
            )

    def _close(self) -> Sequence[tuple[int, Counts]]:
        """Sum the places that every reader has left, and return the epochs, counted from 1, that are complete."""
        first = min(position.place for position in self.positions)
        for place in [place for place in self.open if place < first]:
            number = place // len(self.tars) + 1
            self.epochs[number] = self.epochs.get(number, Counts()) + self.open.pop(place)
        return [(number, self.epochs.pop(number)) for number in sorted(self.epochs) if number * len(self.tars) <= first]

    def _line(self, number: int, of: Counts) -> str:
        return (
            f"epoch {number} of {len(self.tars)} tars: {of.delivered + of.skipped + of.too_short} clips, "
            f"{of.delivered} delivered, {of.skipped} skipped, {of.too_short} too short; {of.refused} tars refused"
        )


def _rows(counts: Mapping[int, Counts]) -> list[list[int]]:
    return [[number, *of] for number, of in sorted(counts.items())]
