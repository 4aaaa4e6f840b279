"""A training run from its config: set up, resume, train, leave."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from parallel.exchange import from_first, num_ranks, own_rank, together
from parallel.mesh import ranks_per_node
from parallel.ranks import start_ranks
from vidit.batching import bucket_costs
from vidit.config import RunConfig
from vidit.data.clip_list import Clips
from vidit.data.loader import read_ahead
from vidit.data.stream_loader import StreamBatches
from vidit.resolve import resolve
from vidit.train.audit import recalled
from vidit.train.clips import Splits, fingerprints, read_splits, require_same_clips
from vidit.train.costs import Start, costed
from vidit.train.ema import Ema
from vidit.train.encoding import require_same_encoders
from vidit.train.entry import by_order
from vidit.train.goodput import Ledger, report_goodput
from vidit.train.initial import new_parts
from vidit.train.layout import with_layout
from vidit.train.lock import run_lock
from vidit.train.loop import Account, Beat, TrainLoop, Watchers
from vidit.train.metrics import Reporter, SilentReporter, rewind
from vidit.train.optim import build_optimizer
from vidit.train.peak import peak_flops
from vidit.train.precision import choose_device, choose_dtype, deterministic
from vidit.train.review import Review
from vidit.train.run_data import open_data
from vidit.train.rundir import open_run
from vidit.train.saves import resume
from vidit.train.state import TrainState
from vidit.train.step import DitStep
from vidit.train.stop import StoppedError, StopRequest
from vidit.train.stream_account import StreamAccount
from vidit.train.task import Task, build_task
from vidit.train.whitening import NUM_CLIPS, finish_vae
from vidit.vae.discriminator import JUDGE
from vidit.vae.stored import adopt_vae, find_vae
from vidit.whole_file import full_disk_explained

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
        stack.enter_context(deterministic(config.train.deterministic))
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
            refs = Clips.chained([split.refs for split in splits])
            require_same_encoders(task.config, refs, task.step.vae, task.text if config.denoiser.reads_text else None)
        optimizer = build_optimizer(config.train, dict(task.model.named_parameters()), config.vae_train)
        average = Ema(task.model, config.train.ema_decay, without=JUDGE)
        wait_s = config.parallel.timeout_s / 2
        state = TrainState(
            task.model, optimizer, average, background=config.train.async_checkpoint, save_timeout_s=wait_s
        )
        ledger.started("model")
        begun = new_parts(config, [name for name, _ in task.model.named_parameters()])
        held, notes = resume(config.directory / "checkpoints", state)
        ledger.started("checkpoint")
        if own_rank() == 0:
            ledger.keep(config.directory, state.step)
        try:
            done = _train(task, state, splits, stop, held, [*begun, *notes], ledger, ranks.heartbeat.beat)
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
    data = open_data(task, splits, stop, reporter, held.get("stream"))
    dataset, order = data.training, data.order
    accumulation = resolve(config).accumulation
    asked = range(state.step * accumulation, config.train.steps * accumulation)
    batches = read_ahead(dataset, asked, config.data.num_workers, config.data.prefetch)
    require_same_clips([fingerprints(splits), order], "the dataset", config.data.train)
    if held.get("order", order) != order:
        raise RuntimeError(
            f"{len(dataset.refs)} clips of {config.data.train} can be used now, and they are not those that {run_dir} "
            "was trained on, so its order of clips cannot be kept; data.json names the clips that fail: restore the "
            "dataset, or give a new run_dir"
        )
    costs = bucket_costs(config)
    if held.get("costs", costs) != costs:
        raise RuntimeError(
            f"a row of each bucket costs {costs} of the dearest here and cost {held['costs']} where {run_dir} was "
            "begun, so its order of clips cannot be kept: go on with the vidit that began it, or give a new run_dir"
        )
    described = {"name": config.name, "config": config.model_dump(mode="json")}
    facts: dict[str, Any] = {**described, "data": fingerprints(splits), "order": order, "costs": costs}
    peak = peak_flops(device, choose_dtype(config.train.precision, device)) if task.forward_flops else None
    review = Review(task, state, data.validation, data.num_batches, reporter, stop)
    ledger.started("data")
    if isinstance(dataset, StreamBatches):
        account: Account = StreamAccount(dataset, facts, held.get("stream", {})).enter
    else:
        account = by_order(recalled(config, dataset.catalog, state.step) if own_rank() == 0 else None)
    watchers = Watchers(review, reporter, ledger, stop, beat, account)
    done = TrainLoop(task, state, batches, watchers, run_dir / "checkpoints", facts, held, peak).run()
    if done and config.train.task == "vae":
        num, clips = data.measured(NUM_CLIPS)
        if not config.vae_train.freeze_encoder:
            reporter.say(f"latent mean and std over {num} training clips")
        finish_vae(config, task.model, state.ema, clips, run_dir / "vae", stop.check)
    return done
