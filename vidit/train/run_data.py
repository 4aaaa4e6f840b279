"""What a run draws on: its training batches, its fixed ones of validation, and the digest that its order stands on.

data.json in the run directory says what they are made of.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from parallel.exchange import exchange, from_first, in_order, together
from vidit.data.catalog import Catalog, Dropped
from vidit.data.listing import number_of
from vidit.data.loader import Batch, MicroBatches
from vidit.data.packed import PackedRows
from vidit.data.shards import ClipRef, read_index
from vidit.data.stream_loader import StreamBatches, num_readers
from vidit.data.stream_plan import begin, resumed
from vidit.resolve import resolve
from vidit.train.clips import Split, Splits, StreamSplit, fixed_batches, require_same_clips
from vidit.train.encode_clips import ClipEncoder
from vidit.train.encode_set import CLIPS_PER_SHARD, encode_set
from vidit.train.fingerprint import order_of
from vidit.train.metrics import Reporter
from vidit.train.skips import SkipCount
from vidit.train.step import DitStep
from vidit.train.stop import StopRequest
from vidit.train.task import Task
from vidit.whole_file import write_whole

WELL_FILLED = 0.9
"""Share of a packed row's tokens below which a run says how to fill more."""


@dataclass(frozen=True)
class RunData:
    """This rank's training batches and fixed ones of validation, of which all ranks have `num_batches`.

    `order` is a digest of the clips that can be used: one that fails where latents are encoded before the first step
    moves every later one.
    """

    training: MicroBatches | StreamBatches
    validation: list[Batch]
    num_batches: int
    order: str

    def measured(self, most: int) -> tuple[int, Iterator[Batch]]:
        """(how many, in batches): training clips that never differ, of a stream the first."""
        if isinstance(self.training, StreamBatches):
            return most, self.training.first(most)
        num = min(most, len(self.training.refs))
        return num, fixed_batches(self.training.config, self.training.refs, num, None, 1)


def open_data(
    task: Task, splits: Splits, stop: StopRequest, reporter: Reporter, streamed: dict[str, Any] | None
) -> RunData:
    """Collective. `streamed` is what a checkpoint says of the readers of a stream, None to begin with.

    Encodes all clips first where `data.cache_latents` says so. StoppedError on a signal.
    """
    config, (train, held) = task.config, splits
    catalog, failed = train.catalog, list[tuple[str, str]]()
    if config.data.cache_latents and isinstance(task.step, DitStep):
        catalog, failed = _cached(task, task.step, catalog, stop, reporter)
    validation, num_batches, replaced = _validation(task, held.refs, stop)
    for key, reason in replaced:
        reporter.say(f"skipped clip {key}: {reason}")
    used = replace(train, catalog=catalog, dropped=train.dropped + failed)
    _report(task, used, held, replaced, reporter)
    order = order_of(train.refs, {key for key, _ in failed})
    if isinstance(train, StreamSplit):
        with together():
            training: MicroBatches | StreamBatches = _stream(task, train, reporter, streamed)
    else:
        images = resolve(config).latent_frames
        training = MicroBatches(config, catalog, task.tokenizer, images, *task.data_place, str(task.step.device))
        if isinstance(rows := training.schedule, PackedRows):
            reporter.say(filled(rows))
    return RunData(training, validation, num_batches, order)


def filled(rows: PackedRows) -> str:
    """What is said of packed rows before the first step."""
    word = f"packed rows of at most {rows.limit} tokens, {rows.fill:.1%} full, {rows.clips_per_row:.1f} clips each"
    if rows.fill < WELL_FILLED:
        cure, largest = rows.fuller(WELL_FILLED), max(rows.load.tokens)
        word += (
            f": clips of the largest of data.buckets have {largest} tokens, beside which others leave room; "
            f"data.packed_tokens={cure.limit} would be {cure.fill:.1%} full"
        )
    return word


def _cached(
    task: Task, step: DitStep, catalog: Catalog, stop: StopRequest, reporter: Reporter
) -> tuple[Catalog, Dropped]:
    """The clips of a run, encoded before its first step into its own directory, and those that cannot be."""
    config, folder = task.config, task.config.directory / "latents"
    text = task.text if config.denoiser.reads_text else None
    encoder = ClipEncoder(step.vae, config.vae, text, step.device, "fp32")
    # What was encoded for other clips or another VAE is of no use to anyone: the folder is the run's own.
    made = encode_set(config, catalog, folder, encoder, reporter.say, stop.check_alone, CLIPS_PER_SHARD, overwrite=True)
    with together():
        refs = read_index(folder)
    SkipCount(config.data.max_skipped, reporter).add(len(refs), made.skipped)
    return Catalog.plain(refs), made.skipped


def _validation(task: Task, refs: Sequence[ClipRef], stop: StopRequest) -> tuple[list[Batch], int, Dropped]:
    """(this rank's batches, how many all ranks have, the clips that had to be replaced)."""
    config, images = task.config, resolve(task.config).latent_frames
    batches: list[Batch] = []
    with together():
        for batch in fixed_batches(config, refs, len(refs), task.tokenizer, images, *task.data_place):
            if stop.signal:
                break
            batches.append(batch)
    stop.check()
    own: list[Any] = [[batch.rows[0], batch.keys, batch.skipped] for batch in batches]
    told = in_order(exchange(own, task.rows))
    require_same_clips(told, "validation", config.data.validation or config.data.train)
    num_batches = len({row for row, _, _ in told})
    return batches, num_batches, [(key, reason) for _, _, skipped in told[:num_batches] for key, reason in skipped]


def _report(task: Task, train: Split, held: Split, replaced: Dropped, reporter: Reporter) -> None:
    config = task.config
    report = train.report() | {"validation": held.report() | {"replaced": replaced}}
    from_first(lambda: write_whole(config.directory / "data.json", json.dumps(report, indent=1) + "\n"))
    size = " ".join(dict.fromkeys(f"{shape.height}x{shape.width}" for shape in config.data.shapes))
    for line in train.selection:
        reporter.say(line)
    for name, part in (("", report), ("validation ", report["validation"])):
        left_out, cut = (number_of(part, what) for what in ("dropped", "cropped"))
        if part["used"]:
            reporter.say(f"{part['used']} {name}clips, {left_out} dropped, {cut} cropped to {size}")


def _stream(task: Task, train: StreamSplit, reporter: Reporter, held: dict[str, Any] | None) -> StreamBatches:
    """This rank's batches of a stream, from where a checkpoint says that its readers were."""
    readers = num_readers(task.config, task.data_place[1])
    plan = begin(readers)
    reporter.say(f"{len(train.tars)} tars without an index, by {readers} readers: a resume reads the last ones again")
    if held:
        plan, note = resumed(held, readers, len(train.tars))
        reporter.say(note)
    return StreamBatches(task.config, train.tars, task.tokenizer, plan, *task.data_place, str(task.step.device))
