"""A training run from its config: set up, resume, train, leave."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from parallel.exchange import exchange, from_first, in_order, num_ranks, own_rank, together
from parallel.mesh import ranks_per_node
from parallel.ranks import start_ranks
from vidit.config import RunConfig
from vidit.data.catalog import Catalog, Dropped
from vidit.data.clip_list import Clips
from vidit.data.listing import number_of
from vidit.data.loader import Batch, MicroBatches, read_ahead
from vidit.data.shards import read_index
from vidit.data.stream_loader import StreamBatches, num_readers
from vidit.data.stream_plan import begin, resumed
from vidit.resolve import resolve
from vidit.train.audit import recalled
from vidit.train.clips import Splits, StreamSplit, fingerprints, fixed_batches, read_splits, require_same_clips
from vidit.train.costs import Start, costed
from vidit.train.ema import Ema
from vidit.train.encode_clips import ClipEncoder
from vidit.train.encode_set import CLIPS_PER_SHARD, encode_set
from vidit.train.encoding import require_same_encoders
from vidit.train.entry import by_order
from vidit.train.fingerprint import digest
from vidit.train.goodput import Ledger, report_goodput
from vidit.train.layout import with_layout
from vidit.train.lock import run_lock
from vidit.train.loop import Account, Beat, Watchers, train_loop
from vidit.train.metrics import Reporter, SilentReporter, rewind
from vidit.train.optim import build_optimizer
from vidit.train.peak import peak_flops
from vidit.train.precision import choose_device, choose_dtype
from vidit.train.review import Review
from vidit.train.rundir import open_run
from vidit.train.saves import resume
from vidit.train.skips import SkipCount
from vidit.train.state import TrainState
from vidit.train.step import DitStep
from vidit.train.stop import StoppedError, StopRequest
from vidit.train.stream_account import StreamAccount
from vidit.train.task import Task, build_task
from vidit.train.whitening import NUM_CLIPS, finish_vae
from vidit.vae.stored import adopt_vae, find_vae
from vidit.whole_file import full_disk_explained, write_whole

Left = Callable[[int, bool, str | None], None]
"""(step, whether the run is done, name of the signal that came to this rank): a run has been left, all is saved."""


def run(config: RunConfig, left: Left | None = None, began: float | None = None) -> bool:
    """Train a run to its end, resuming whatever is in its directory. True when done, False when told to stop.

    Every rank of a run calls this; where there are several, the first keeps the run directory, and calls `left` when
    all is saved. `began`: Unix time from which the start-up counts, when the process was started for this; by default
    now.
    """
    device, p = choose_device(config.train.device), config.parallel
    ledger = Ledger(began or time.time())
    ledger.started("imports")
    with start_ranks(device.type, p.timeout_s, p.hang_factor, p.hang_floor_s) as ranks, ExitStack() as stack:
        ledger.started("meeting")
        stack.enter_context(full_disk_explained(config.directory))
        with together():
            config = with_layout(adopt_vae(find_vae(config), num_ranks()), num_ranks(), ranks_per_node())
            splits = read_splits(config)
            if own_rank() == 0:
                stack.enter_context(run_lock(config.directory))
        stop = stack.enter_context(StopRequest())
        from_first(lambda: str(open_run(config, fingerprints(splits))))
        ledger.started("dataset")
        start = stack.enter_context(costed(config.directory, "train")) if own_rank() == 0 else Start()
        task = build_task(config, device, len(splits[1].refs))
        if isinstance(task.step, DitStep):
            refs = [*splits[0].refs, *splits[1].refs]
            require_same_encoders(task.config, refs, task.step.vae, task.text if config.model.reads_text else None)
        optimizer = build_optimizer(config.train, dict(task.model.named_parameters()))
        average = Ema(task.model, config.train.ema_decay)
        wait_s = config.parallel.timeout_s / 2
        state = TrainState(
            task.model, optimizer, average, background=config.train.async_checkpoint, save_timeout_s=wait_s
        )
        ledger.started("model")
        held, notes = resume(config.directory / "checkpoints", state)
        ledger.started("checkpoint")
        if own_rank() == 0:
            ledger.keep(config.directory, state.step)
        try:
            done = _train(task, state, splits, stop, held, notes, ledger, ranks.heartbeat.beat)
            if left and own_rank() == 0:
                left(state.step, done, stop.signal.name if stop.signal else None)
            return done
        finally:
            start.step = state.step
            if num_ranks() == 1:
                state.saver.join()


def _train(
    task: Task,
    state: TrainState,
    splits: Splits,
    stop: StopRequest,
    held: dict[str, Any],
    notes: list[str],
    ledger: Ledger,
    beat: Beat,
) -> bool:
    """Train from the state; `held` are the facts of the checkpoint that it came from, `notes` what to say of that."""
    config, run_dir = task.config, task.config.directory
    from_first(lambda: rewind(run_dir, state.step))
    reports = own_rank() == 0
    with Reporter(run_dir, config.train.steps, state.step) if reports else SilentReporter() as reporter:
        for note in notes:
            reporter.say(note)
        if state.step:
            reporter.say(f"resumed {run_dir} at step {state.step}")
        try:
            done = _reach_the_end(task, state, splits, stop, reporter, held, ledger, beat)
        except StoppedError:
            done = False
        by = stop.signal.name if stop.signal else "a signal to another rank"
        why = "done" if done else f"stopped by {by}"
        reporter.say(f"{why} at step {state.step}, {run_dir}")
        from_first(lambda: report_goodput(reporter, run_dir, state.step))
    return done


def _reach_the_end(
    task: Task,
    state: TrainState,
    splits: Splits,
    stop: StopRequest,
    reporter: Reporter,
    held: dict[str, Any],
    ledger: Ledger,
    beat: Beat,
) -> bool:
    config, device, run_dir = task.config, task.step.device, task.config.directory
    dataset, validation, num_batches, order = _data(task, splits, stop, reporter, held)
    accumulation = resolve(config).accumulation
    asked = range(state.step * accumulation, config.train.steps * accumulation)
    data = read_ahead(dataset, asked, config.data.num_workers, config.data.prefetch)
    require_same_clips([fingerprints(splits), order], "the dataset", config.data.train)
    if held.get("order", order) != order:
        raise RuntimeError(
            f"{len(dataset.refs)} clips of {config.data.train} can be used now, and they are not those that {run_dir} "
            "was trained on, so its order of clips cannot be kept; data.json names the clips that fail: restore the "
            "dataset, or give a new run_dir"
        )
    described = {"name": config.name, "config": config.model_dump(mode="json")}
    facts: dict[str, Any] = {**described, "data": fingerprints(splits), "order": order}
    peak = peak_flops(device, choose_dtype(config.train.precision, device)) if task.forward_flops else None
    review = Review(task, state, validation, num_batches, reporter, stop)
    ledger.started("data")
    if isinstance(dataset, StreamBatches):
        account: Account = StreamAccount(dataset, facts, held.get("stream", {})).enter
    else:
        account = by_order(recalled(config, dataset.catalog, state.step) if own_rank() == 0 else None)
    watchers = Watchers(review, reporter, ledger, stop, beat, account)
    done = train_loop(task, state, data, watchers, run_dir / "checkpoints", facts, held, peak)
    if done and config.train.task == "vae":
        num = NUM_CLIPS if isinstance(dataset, StreamBatches) else min(NUM_CLIPS, len(dataset.refs))
        reporter.say(f"latent mean and std over {num} training clips")
        clips = _measured(dataset, num)
        finish_vae(config, task.model, state.ema, clips, run_dir / "vae", stop.check)
    return done


def _measured(dataset: MicroBatches | StreamBatches, num: int) -> Iterator[Batch]:
    """So many training clips, which never differ: the first of a stream."""
    if isinstance(dataset, StreamBatches):
        return dataset.first(num)
    return fixed_batches(dataset.config, dataset.refs, num, None, 1)


def _cached(
    task: Task, step: DitStep, catalog: Catalog, stop: StopRequest, reporter: Reporter
) -> tuple[Catalog, Dropped]:
    """The clips of a run, encoded before its first step into its own directory, and those that cannot be."""
    config, folder = task.config, task.config.directory / "latents"
    text = task.text if config.model.reads_text else None
    encoder = ClipEncoder(step.vae, config.vae, text, step.device, "fp32")
    # What was encoded for other clips or another VAE is of no use to anyone: the folder is the run's own.
    made = encode_set(config, catalog, folder, encoder, reporter.say, stop.check_alone, CLIPS_PER_SHARD, overwrite=True)
    with together():
        refs = read_index(folder)
    SkipCount(config.data.max_skipped, reporter).add([ref.key for ref in refs], made.skipped)
    return Catalog.plain(refs), made.skipped


def _data(
    task: Task, splits: Splits, stop: StopRequest, reporter: Reporter, facts: dict[str, Any]
) -> tuple[MicroBatches | StreamBatches, list[Batch], int, str]:
    """This rank's training batches and its fixed ones of validation, how many of those all ranks have, and the order.

    data.json says what they are made of. The order is a digest of the clips that can be used: one that fails where
    latents are encoded before the first step moves every later one.
    """
    config, (train, held) = task.config, splits
    catalog = train.catalog
    failed: Dropped = []
    if config.data.cache_latents and isinstance(task.step, DitStep):
        catalog, failed = _cached(task, task.step, catalog, stop, reporter)
    images = resolve(config).latent_frames
    rank, world = task.data_place
    validation: list[Batch] = []
    with together():
        for batch in fixed_batches(config, held.refs, len(held.refs), task.tokenizer, images, rank, world):
            if stop.signal:
                break
            validation.append(batch)
    stop.check()
    own: list[Any] = [[batch.rows[0], batch.keys, batch.skipped] for batch in validation]
    told = in_order(exchange(own, task.rows))
    require_same_clips(told, "validation", config.data.validation or config.data.train)
    num_batches = len({row for row, _, _ in told})
    replaced: Dropped = [(key, reason) for _, _, skipped in told[:num_batches] for key, reason in skipped]
    for key, reason in replaced:
        reporter.say(f"skipped clip {key}: {reason}")
    report = replace(train, catalog=catalog, dropped=train.dropped + failed).report() | {
        "validation": held.report() | {"replaced": replaced}
    }
    from_first(lambda: write_whole(config.directory / "data.json", json.dumps(report, indent=1) + "\n"))
    size = " ".join(dict.fromkeys(f"{shape.height}x{shape.width}" for shape in config.data.shapes))
    for line in train.selection:
        reporter.say(line)
    for name, part in (("", report), ("validation ", report["validation"])):
        left_out, cut = (number_of(part, what) for what in ("dropped", "cropped"))
        counts = f"{part['used']} {name}clips, {left_out} dropped, {cut} cropped to {size}"
        if part["used"]:
            reporter.say(counts)
    lost, used = {key for key, _ in failed}, Clips.of(train.refs)
    if lost:
        used = used.take(np.array([number for number in range(len(used)) if used.key(number) not in lost], np.int64))
    order = digest(used)
    if isinstance(train, StreamSplit):
        with together():
            stream = _stream(task, train, reporter, facts.get("stream"))
        return stream, validation, num_batches, order
    return MicroBatches(config, catalog, task.tokenizer, images, rank, world), validation, num_batches, order


def _stream(task: Task, train: StreamSplit, reporter: Reporter, held: dict[str, Any] | None) -> StreamBatches:
    """This rank's batches of a stream, from where a checkpoint says that its readers were."""
    readers = num_readers(task.config, task.data_place[1])
    plan = begin(readers)
    reporter.say(f"{len(train.tars)} tars without an index, by {readers} readers: a resume reads the last ones again")
    if held:
        plan, note = resumed(held, readers, len(train.tars))
        reporter.say(note)
    return StreamBatches(task.config, train.tars, task.tokenizer, plan, *task.data_place)
