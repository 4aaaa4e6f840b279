"""Micro-batches of a stream of tars, as `vidit/data/loader.py` has them of an index.

Every data rank has a reader in each of its worker processes, and micro-batch i of a rank comes from reader i mod
`data.num_workers`, which is the process that the DataLoader gives it to. So a dataset has a state here: of each reader
the batches are asked for in their order, from the one on at which the run begins. A clip that cannot be used is left
out, with a reason, and the next one takes its place.
"""

from collections.abc import Iterator

from torch.utils.data import Dataset as TorchDataset

from vidit import keys
from vidit.config import RunConfig
from vidit.data.buckets import schedule_of
from vidit.data.captions import CaptionError, clean_caption
from vidit.data.clip_ref import ClipRef
from vidit.data.limits import ClipError, TooShortError
from vidit.data.loader import MAX_SUBSTITUTES, Batch, Skip, pixels_of
from vidit.data.rows import Row, clips_of
from vidit.data.stream_plan import Mark, Plan, begin
from vidit.data.stream_reader import Item, Reader
from vidit.data.stream_tars import Tars
from vidit.text.encoder import CaptionTokenizer

MAX_TOO_SHORT = 2000
"""In a row, after which none long enough is expected."""


def num_readers(config: RunConfig, world: int) -> int:
    """Of a run on so many data ranks."""
    return world * max(1, config.data.num_workers)


class StreamBatches(TorchDataset[Batch]):
    """Micro-batch number -> Batch, for one rank. Picklable, for worker processes, until the first batch is read."""

    def __init__(
        self,
        config: RunConfig,
        tars: Tars,
        tokenizer: CaptionTokenizer | None,
        plan: Plan,
        rank: int = 0,
        world: int = 1,
        device: str = "cuda",
    ):
        """`device` is where data.decoder=nvdec decodes. ValueError where there are fewer tars than readers."""
        self.config, self.data, self.seed = config, config.data, config.train.seed
        self.tars, self.tokenizer, self.plan, self.rank, self.world = tars, tokenizer, plan, rank, world
        assert plan.readers == num_readers(config, world)
        if plan.readers > len(tars):
            raise ValueError(
                f"{plan.readers} readers (data ranks {world} x data.num_workers {max(1, self.data.num_workers)}) for "
                f"{len(tars)} tars of {self.data.train}: each reads a tar of its own; lower data.num_workers, or give "
                f"{plan.readers} tars or more"
            )
        self.device = device
        self.refs: tuple[ClipRef, ...] = ()  # none is known before it is read
        self.schedule = schedule_of(config, [1.0])
        self.captioned = config.train.task != "vae"
        self._readers: dict[int, Reader] = {}

    def __getitem__(self, index: int) -> Batch:
        of = self.schedule.of_rank(index, self.rank, self.world)
        workers = self.plan.readers // self.world
        number = self.rank * workers + index % workers
        if number not in self._readers:
            at = self.plan.positions[number]
            self._readers[number] = Reader(self.tars, self.seed, self.plan.readers, at, self.data.shuffle_buffer)
        reader = self._readers[number]
        mark, skipped = Mark(number, reader.position), list[Skip]()
        rows = [self._row(reader, mark, skipped) for _ in of.rows]
        mark.position = reader.position
        tokens = None if self.tokenizer is None else self.tokenizer([row.caption for row in rows])
        shape = self.data.shapes[0]
        size = shape.num_frames, shape.height, shape.width
        return Batch(
            list(of.rows), clips_of(rows), None, tokens, of.round_rows, of.step_rows, skipped, None, size, mark
        )

    def _row(self, reader: Reader, mark: Mark, skipped: list[Skip]) -> Row:
        """The next clip that can be used. RuntimeError after too many that cannot."""
        lost = too_short = 0
        while lost < MAX_SUBSTITUTES and too_short < MAX_TOO_SHORT:
            item = reader.take()
            if item.refused:
                skipped.append((item.name, item.refused))
                mark.count(item.place, refused=1)
                lost += 1
                continue
            try:
                row = self._decoded(item)
                mark.count(item.place, delivered=1)
                return row
            except TooShortError as error:
                mark.too_short.append((item.name, str(error)))
                mark.count(item.place, too_short=1)
                too_short += 1
            except (ClipError, CaptionError) as error:
                skipped.append((item.name, str(error)))
                mark.count(item.place, skipped=1)
                lost += 1
        name, reason = (skipped if lost == MAX_SUBSTITUTES else mark.too_short)[-1]
        raise RuntimeError(
            f"{lost + too_short} clips in a row cannot be used, the last: {name}: {reason}; check "
            f"{self.data.train} and data.num_frames"
        )

    def _decoded(self, item: Item) -> Row:
        text, _ = clean_caption(item.caption(), allow_empty=not self.captioned)
        shape = self.data.shapes[0]
        pixels = pixels_of(item.video(), self.data, self.seed, f"stream/{item.number}", False, shape, self.device)
        dropped = keys.uniform(self.seed, "caption_dropout/stream", [item.number]) < self.data.caption_dropout
        return Row(item.name, "" if bool(dropped) else text, shape.rate(self.data.fps), pixels, None, None)

    def first(self, num: int) -> Iterator[Batch]:
        """The first `num` clips of the stream, or a few more, the same on every rank: no dropout, middle crop."""
        data = self.data.undrawn().model_copy(update={"num_workers": 0, "shuffle_buffer": 0})
        config = self.config.model_copy(update={"data": data})
        train = config.train.model_copy(update={"global_batch": config.train.micro_batch})
        stream = StreamBatches(config.model_copy(update={"train": train}), self.tars, self.tokenizer, begin(1))
        yield from map(stream.__getitem__, range(-(-num // train.micro_batch)))
