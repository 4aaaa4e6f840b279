"""A training run from its config: set up, resume, train, leave."""

import json
from dataclasses import replace
from typing import Any

from vidit.config import RunConfig
from vidit.data.loader import Batch, MicroBatches, batches
from vidit.resolve import resolve
from vidit.train.clips import Reasons, Splits, fingerprints, fixed_batches, read_splits
from vidit.train.costs import costed
from vidit.train.ema import Ema
from vidit.train.fingerprint import digest
from vidit.train.latents import LatentCache
from vidit.train.lock import run_lock
from vidit.train.loop import train_loop
from vidit.train.metrics import Reporter, rewind
from vidit.train.optim import build_optimizer
from vidit.train.peak import peak_flops
from vidit.train.precision import choose_device, choose_dtype
from vidit.train.review import Review
from vidit.train.rundir import find_vae, open_run
from vidit.train.skips import SkipCount
from vidit.train.state import TrainState
from vidit.train.step import DitStep
from vidit.train.stop import StoppedError, StopRequest
from vidit.train.task import Task, build_task
from vidit.train.whitening import NUM_CLIPS, finish_vae
from vidit.vae.stored import adopt_vae
from vidit.whole_file import full_disk_explained, write_whole


def run(config: RunConfig) -> bool:
    """Train a run to its end, resuming whatever is in its directory. True when done, False when told to stop."""
    config = adopt_vae(find_vae(config))
    resolve(config)
    splits = read_splits(config)
    with full_disk_explained(config.directory), run_lock(config.directory), StopRequest() as stop:
        newest = open_run(config, fingerprints(splits))
        with costed(config.directory, "train") as start:
            device = choose_device(config.train.device)
            task = build_task(config, device, len(splits[1].refs))
            optimizer = build_optimizer(config.train, dict(task.model.named_parameters()))
            state = TrainState(task.model, optimizer, Ema(task.model, config.train.ema_decay))
            held = state.load(newest) if newest else {}
            try:
                return _train(task, state, splits, stop, held)
            finally:
                start.step = state.step


def _train(task: Task, state: TrainState, splits: Splits, stop: StopRequest, held: dict[str, Any]) -> bool:
    """Train from the state; `held` are the facts of the checkpoint that it came from."""
    config, run_dir = task.config, task.config.directory
    rewind(run_dir, state.step)
    with Reporter(run_dir, config.train.steps, state.step) as reporter:
        if state.step:
            reporter.say(f"resumed {run_dir} at step {state.step}")
        try:
            done = _reach_the_end(task, state, splits, stop, reporter, held)
        except StoppedError:
            done = False
        why = f"stopped by {stop.signal.name}" if stop.signal and not done else "done"
        reporter.say(f"{why} at step {state.step}, {run_dir}")
    return done


def _reach_the_end(
    task: Task, state: TrainState, splits: Splits, stop: StopRequest, reporter: Reporter, held: dict[str, Any]
) -> bool:
    config, device = task.config, next(task.model.parameters()).device
    run_dir = config.directory
    dataset, validation = _data(task, splits, stop, reporter)
    accumulation = resolve(config).accumulation
    data = batches(dataset, state.step * accumulation, config.train.steps * accumulation)
    # Latents are encoded before the first step, and a clip that fails there moves every later one of the order.
    order = digest(dataset.refs)
    if held.get("order", order) != order:
        raise RuntimeError(
            f"{len(dataset.refs)} clips of {config.data.train} can be used now, and they are not those that {run_dir} "
            "was trained on, so its order of clips cannot be kept; data.json names the clips that fail: restore the "
            "dataset, or give a new run_dir"
        )
    described = {"name": config.name, "config": config.model_dump(mode="json")}
    facts = {**described, "data": fingerprints(splits), "order": order}
    flops = task.flops_per_step
    peak = peak_flops(device, choose_dtype(config.train.precision, device)) if flops else None
    review = Review(task, state, validation, reporter, stop)
    done = train_loop(
        config, state, task.step, data, review, reporter, stop, run_dir / "checkpoints", facts, flops, peak
    )
    if done and config.train.task == "vae":
        num = min(NUM_CLIPS, len(dataset.refs))
        reporter.say(f"latent mean and std over {num} training clips")
        clips = fixed_batches(config, dataset.refs, num, None, 1)
        finish_vae(config, task.model, state.ema, clips, run_dir / "vae", stop.check)
    return done


def _data(task: Task, splits: Splits, stop: StopRequest, reporter: Reporter) -> tuple[MicroBatches, list[Batch]]:
    """The training batches, and the fixed ones of validation; data.json says what they are made of."""
    config, (train, held) = task.config, splits
    refs, store = train.refs, None
    failed: Reasons = []
    if config.data.cache_latents and isinstance(task.step, DitStep):
        cache = LatentCache(config, refs, task.step.vae, task.step.device, config.directory / "latents")
        refs, store, failed = cache.load(reporter.say, stop.check)
        SkipCount(config.data.max_skipped, reporter).add([ref.key for ref in refs], failed)
    images = resolve(config).latent_frames
    validation: list[Batch] = []
    replaced: Reasons = []
    for batch in fixed_batches(config, held.refs, len(held.refs), task.tokenizer, images):
        stop.check()
        for key, reason in batch.skipped:
            reporter.say(f"skipped clip {key}: {reason}")
        replaced += batch.skipped
        validation.append(batch)
    report = replace(train, refs=refs, dropped=train.dropped + failed).report() | {
        "validation": held.report() | {"replaced": replaced}
    }
    write_whole(config.directory / "data.json", json.dumps(report, indent=1) + "\n")
    size = f"{config.data.height}x{config.data.width}"
    for name, part in (("", report), ("validation ", report["validation"])):
        counts = f"{part['used']} {name}clips, {len(part['dropped'])} dropped, {len(part['cropped'])} cropped to {size}"
        if part["used"]:
            reporter.say(counts)
    return MicroBatches(config, refs, task.tokenizer, images, store), validation
