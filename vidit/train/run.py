"""A training run from its config: set up, resume, train, leave."""

import errno
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from parallel import checkpoint
from vidit.config import ConfigError, RunConfig, resolve
from vidit.data.encode import encode_mp4
from vidit.data.loader import Batch, MicroBatches, batches, usable
from vidit.data.shards import ClipRef, read_index
from vidit.model.flops import forward_flops, training_flops
from vidit.sample.draw import draw
from vidit.text.encoder import TextEncoder, build_text_encoder
from vidit.train.ema import Ema
from vidit.train.latents import cached_latents
from vidit.train.loop import SkipCount, train_loop
from vidit.train.memory import PeakMemory
from vidit.train.metrics import Reporter, rewind
from vidit.train.optim import build_optimizer
from vidit.train.parallelize import build_dit, build_vae
from vidit.train.peak import peak_flops
from vidit.train.precision import choose_device, choose_dtype
from vidit.train.rundir import keep_vae, open_run, record_cost
from vidit.train.state import TrainState
from vidit.train.step import DitStep, Step, VaeStep
from vidit.train.stop import StopRequest
from vidit.train.whitening import finish_vae
from vidit.vae.store import load_vae
from vidit.vae.stored import adopt_vae

Split = tuple[Sequence[ClipRef], Sequence[ClipRef]]


@dataclass
class Task:
    """What the tasks differ in: the model, the step, and what needs the text or the frozen VAE."""

    config: RunConfig
    model: nn.ModuleDict
    step: Step
    text: TextEncoder | None
    forward_flops: int


def run(config: RunConfig) -> bool:
    """Train a run to its end, resuming whatever is in its directory. True when done, False when told to stop."""
    config = adopt_vae(config)
    resolve(config)
    clips = _split(config)
    started = time.time()
    with _disk(config.directory), PeakMemory() as memory:
        state, done = _train(config, clips)
    record_cost(config.directory, "train", time.time() - started, state.step, memory.peak_gib)
    return done


@contextmanager
def _disk(run_dir: Path) -> Iterator[None]:
    """A full disk, which the system reports without a name, as an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RuntimeError(
            f"cannot write to {run_dir}: {error.strerror}; free space, then run the same command again: "
            "the checkpoints are untouched"
        ) from error


def _train(config: RunConfig, clips: Split) -> tuple[TrainState, bool]:
    root = config.directory / "checkpoints"
    found = checkpoint.steps(root)
    open_run(config, bool(found))
    device = choose_device(config.train.device)
    task = build_task(config, device)
    config = task.config
    state = TrainState(
        task.model,
        build_optimizer(config.train, task.model.parameters()),
        Ema(task.model, config.train.ema_decay),
    )
    if found:
        state.load(checkpoint.folder_of(root, found[-1]))
    rewind(config.directory, state.step)
    with StopRequest() as stop, Reporter(config.directory, config.train.steps, state.step) as reporter:
        if found:
            reporter.say(f"resumed {config.directory} at step {state.step}")
        dataset, validation = _data(task, clips, device, reporter)
        first = state.step * resolve(config).accumulation
        last = config.train.steps * resolve(config).accumulation
        training = training_flops(task.forward_flops, config.model.self_conditioning) * config.train.global_batch
        done = train_loop(
            config, state, task.step, batches(dataset, first, last), validation, reporter, stop, root, training,
            peak_flops(device, choose_dtype(config.train.precision, device)), _preview(task, state, reporter),
        )  # fmt: skip
        why = f"stopped by {stop.signal.name}" if stop.signal and not done else "done"
        reporter.say(f"{why} at step {state.step}, {config.directory}")
        if done and config.train.task == "vae":
            finish_vae(config, task.model, state.ema, validation or [dataset[0]], config.directory / "vae")
        elif done:
            _preview(task, state, reporter)(state.step)
    return state, done


def build_task(config: RunConfig, device: torch.device) -> Task:
    """Model and step of `train.task`, on the device, with initial weights."""
    dtype = choose_dtype(config.train.precision, device)
    if config.train.task == "vae":
        return Task(config, model := build_vae(config, device, dtype), VaeStep(config, device), None, 0 * len(model))
    config = keep_vae(config)
    vae = load_vae(Path(config.vae.weights or ""), device, dtype)
    text = build_text_encoder(config.text, dtype)
    model = build_dit(config, text, device, dtype)
    if not text.trainable:
        text.to(device)
    flops = forward_flops(config.model, resolve(config).grid, config.vae.latent_channels, text.width, text.max_tokens)
    return Task(config, model, DitStep(config, vae, text, device), text, flops)


def _data(task: Task, clips: Split, device: torch.device, reporter: Reporter) -> tuple[MicroBatches, list[Batch]]:
    """The training batches, and the fixed ones of validation."""
    config, d = task.config, task.config.data
    train, validation = clips
    kept, dropped, cropped = usable(train, config)
    if not kept:
        raise ValueError(f"no clip of {d.train} is usable: {len(dropped)} dropped, the first {dropped[0]}")
    store = None
    if d.cache_latents and isinstance(task.step, DitStep):
        path = config.directory / "latents.safetensors"
        kept, store, failed = cached_latents(config, kept, task.step.vae, device, path, reporter.say)
        SkipCount(d.max_skipped, reporter).add([ref.key for ref in kept], failed)
        dropped += failed
    reporter.say(f"{len(kept)} clips, {len(dropped)} dropped, {len(cropped)} cropped to {d.height}x{d.width}")
    report = {"used": len(kept), "dropped": dropped, "cropped": cropped}
    (config.directory / "data.json").write_text(json.dumps(report, indent=1) + "\n")
    images = resolve(config).latent_frames
    tokenizer = task.text.tokenizer if task.text else None
    fixed = _fixed(config, validation, tokenizer, images)
    for batch in fixed:
        SkipCount(1.0, reporter).add(batch.keys, batch.skipped)
    return MicroBatches(config, kept, tokenizer, images, store), fixed


def _split(config: RunConfig) -> Split:
    """Training and validation clips: two folders, or the last `num_validation` clips of one."""
    d = config.data
    refs = read_index(d.train)
    if d.validation:
        return refs, read_index(d.validation)[: d.num_validation]
    if d.num_validation >= len(refs):
        raise ConfigError(
            [f"data.num_validation={d.num_validation} leaves none of the {len(refs)} clips of {d.train} to train on"]
        )
    cut = len(refs) - d.num_validation
    return refs[:cut], refs[cut:]


def _fixed(config: RunConfig, refs: Sequence[ClipRef], tokenizer: object, images: int) -> list[Batch]:
    """Validation batches: every clip once, no dropout, no image rows, middle crop."""
    kept, _, _ = usable(refs, config)
    if not kept:
        return []
    data = config.data.model_copy(update={"image_rows": 0, "caption_dropout": 0.0, "random_crop": False})
    micro = max(n for n in range(1, config.train.micro_batch + 1) if len(kept) % n == 0)
    train = config.train.model_copy(update={"micro_batch": micro})
    fixed = config.model_copy(update={"data": data, "train": train})
    dataset = MicroBatches(fixed, kept, tokenizer, images)  # type: ignore[arg-type]
    return [dataset[i] for i in range(len(kept) // micro)]


def _preview(task: Task, state: TrainState, reporter: Reporter) -> Callable[[int], None]:
    """A function that samples `sample.prompts` with the averaged weights into samples/ and TensorBoard."""
    config = task.config

    def preview(step: int) -> None:
        if not config.sample.prompts or task.text is None or not isinstance(task.step, DitStep):
            return
        folder = config.directory / "samples" / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        state.ema.swap(state.model)
        state.model.eval()
        try:
            videos = draw(config, task.step, state.model, task.text, config.sample.prompts, config.train.seed)
        finally:
            state.model.train()
            state.ema.swap(state.model)
        fps = config.data.fps or 8.0
        for number, video in enumerate(videos):
            (folder / f"{number:03d}.mp4").write_bytes(encode_mp4(video.numpy(), fps))
            reporter.video(step, f"sample/{number}", video, fps)

    return preview
