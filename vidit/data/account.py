"""Where every clip of a run went: delivered, skipped with a reason, or not yet reached.

Which clip stands at which place is a pure function of the config and the data set. What a run says it was given is held
against that, place by place: where the clip that is due was skipped, with a reason, the one stands that is drawn for it
and was not skipped itself. So in each epoch of each stream delivered + skipped + not yet reached is the number of its
clips, or an error names the first place where it is not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vidit.config import RunConfig
from vidit.data.catalog import Catalog
from vidit.data.order import MAX_SUBSTITUTES


class AccountError(RuntimeError):
    """A clip was delivered where another one is due, or one is missing."""


class Due(NamedTuple):
    """A clip that a step asks for: the place in its stream, the how many-th of which epoch, and what it is called."""

    stream: str
    bucket: int
    place: int
    source: int
    epoch: int
    offset: int
    name: str


@dataclass
class Epoch:
    """One pass over the `total` clips of one data set in one bucket, as `stream` says: as clips, or for images."""

    stream: str
    where: str
    number: int
    total: int
    reached: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason) of those that could not be used."""

    @property
    def delivered(self) -> int:
        return self.reached - len(self.skipped)

    def as_dict(self) -> dict[str, Any]:
        """For metrics.jsonl."""
        where = {"where": self.where} if self.where else {}
        return {
            "stream": self.stream, **where, "number": self.number, "clips": self.total, "delivered": self.delivered,
            "skipped": len(self.skipped),
        }  # fmt: skip

    def line(self) -> str:
        where = f" of {self.where}" if self.where else ""
        rest = self.total - self.reached
        left = f", {rest} not yet reached" if rest else ""
        as_what = "" if self.stream == "clips" else f" ({self.stream})"
        return (
            f"epoch {self.number}{where}{as_what}: {self.total} clips, {self.delivered} delivered, "
            f"{len(self.skipped)} skipped{left}"
        )


class Account:
    """Takes what each step was given, in the order of the steps, from any step on.

    `images_per_row` is the number of images in a row of images: latent frames of a clip.
    """

    def __init__(self, config: RunConfig, catalog: Catalog, images_per_row: int):
        self.catalog, self.schedule = catalog, catalog.schedule(config)
        self.seed, self.image_rows = config.train.seed, config.data.image_rows
        self.images_per_row = images_per_row
        shapes = [f"{shape.num_frames}x{shape.height}x{shape.width}" for shape in config.data.shapes]
        self._shapes = shapes if len(shapes) > 1 else [""]
        self.epochs: dict[tuple[str, int, int, int], Epoch] = {}
        """By stream, bucket, data set and number from 0, in the order in which they began."""
        self.failed_substitutes: list[tuple[str, str]] = []
        """(name, reason) of clips that were drawn for skipped ones and skipped too."""

    def due(self, step: int) -> Iterator[Due]:
        """The clips that optimizer step `step`, counted from 1, asks for, in the order of its record."""
        for of in self.schedule.dealt(step - 1):
            for stream, bucket, places in of.asked(self.image_rows, self.images_per_row):
                order = self.catalog.order(self.seed, stream, bucket)
                held = self.catalog.sources_of(bucket)
                for place in places:
                    part, epoch, offset, clip = order.stand(place)
                    yield Due(stream, bucket, place, held[part], epoch, offset, self.catalog.name(clip))

    def recall(self, step: int, skipped: Sequence[tuple[str, str]]) -> None:
        """What an earlier start skipped in a step; the rest of it is known without a record."""
        reasons = dict(skipped)
        for due in self.due(step):
            if due.name in reasons:
                self._epoch(due).skipped.append((due.name, reasons[due.name]))

    def add(self, step: int, keys: Sequence[str], skipped: Sequence[tuple[str, str]]) -> list[Epoch]:
        """Enter what a step was given; returns the epochs that it ended. AccountError.

        `keys` are the names of the clips that were delivered, `skipped` (name, reason) of those that were not, among
        them substitutes that failed as well.
        """
        expected, reasons, asked = list(self.due(step)), dict(skipped), set[str]()
        if len(expected) != len(keys):
            raise AccountError(f"step {step} asks for {len(expected)} clips, and was given {len(keys)}; {CURE}")
        ended = []
        for due, key in zip(expected, keys, strict=True):
            epoch = self._epoch(due)
            tried = self._tried(step, due, key, reasons)
            epoch.skipped += [(name, reasons[name]) for name in tried[:1]]
            self.failed_substitutes += [(name, reasons[name]) for name in tried[1:]]
            asked.update(tried)
            epoch.reached = due.offset + 1
            if epoch.reached == epoch.total:
                ended.append(epoch)
        if strange := sorted(reasons.keys() - asked):
            raise AccountError(f"step {step} is said to have skipped {strange[0]}, which it did not ask for; {CURE}")
        return ended

    def _tried(self, step: int, due: Due, key: str, reasons: Mapping[str, str]) -> list[str]:
        """The clips that were skipped until `key` stood in a place. AccountError where it should not stand there."""
        order, name, tried = self.catalog.order(self.seed, due.stream, due.bucket), due.name, list[str]()
        while name != key:
            if name not in reasons or len(tried) == MAX_SUBSTITUTES:
                raise AccountError(
                    f"step {step}: clip {due.offset + 1} of epoch {due.epoch + 1} of its {due.stream} is {due.name}; "
                    f"{key} was delivered instead, and nothing says that {name} was skipped; {CURE}"
                )
            tried.append(name)
            name = self.catalog.name(order.instead(due.place, len(tried) - 1))
        return tried

    def _epoch(self, due: Due) -> Epoch:
        key = due.stream, due.bucket, due.source, due.epoch
        if key not in self.epochs:
            where = " ".join(filter(None, (self._shapes[due.bucket], self.catalog.labels[due.source].rstrip("/"))))
            total = len(self.catalog.order(self.seed, due.stream, due.bucket).parts[
                self.catalog.sources_of(due.bucket).index(due.source)
            ])  # fmt: skip
            self.epochs[key] = Epoch(due.stream, where, due.epoch + 1, total)
        return self.epochs[key]


CURE = "the data set, the config and the record of the run do not belong together"
