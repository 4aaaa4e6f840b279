"""The run directory: what is written there besides checkpoints and metrics.

lock               held by the process that trains the run
config.json        the resolved config; a resume with another one is refused where it would not fit
environment.json   versions, host, commit, command
source.diff        uncommitted changes of the source tree, when there are any
data.json          clips used, dropped (with the reason) and cropped, of training and of validation
vae/               the frozen VAE that the run is trained on
checkpoints/       step-XXXXXXXX/
latents/           with data.cache_latents: every clip, encoded once
metrics.jsonl, speed.jsonl, tensorboard/, samples/
costs.jsonl        wall time and peak memory of each start
goodput.jsonl      where the time of each start went, up to its last moments
"""

import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

import vidit
from parallel import checkpoint
from vidit.config import ConfigError, Launch, Parallel, RunConfig
from vidit.overrides import faults_of, flat
from vidit.vae.place import vae_folder
from vidit.vae.stored import ORIGIN, is_same_vae, origin_of, vae_files, with_vae
from vidit.whole_file import write_whole

# Fields that may change between two starts of one run: they say where, how fast and what to look at, not what
# is learned. Where the clips lie may change, which clips they are may not: see `_data_faults`.
FREE = {
    "run_dir", "train.device", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints",
    "train.keep_every", "train.async_checkpoint", "train.validate_every", "train.sample_every", "train.compile",
    "train.deterministic", "model.attention_backend", "unet.attention_backend",
    "train.activation_checkpointing", "train.on_nonfinite", "train.on_spike", "train.spike_factor",
    "train.spike_window", "train.roll_back_checkpoints", "train.max_recoveries", "train.recovery_window",
    "data.train", "data.validation", "data.num_workers", "data.prefetch", "data.max_skipped", "vae.weights",
    "vae.revision", "vae.max_frames",
    "data.cache_dir", "data.cache_gib", "data.stall_s", "data.patience_s",
}  # fmt: skip
SOURCE = Path(vidit.__file__).parent.parent
FREE_SECTIONS = ("sample.", "parallel.", "launch.")


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The folder of the newest whole checkpoint."""
    root = run_dir / "checkpoints"
    found = checkpoint.steps(root)
    return checkpoint.folder_of(root, found[-1]) if found else None


def alone(config: RunConfig) -> RunConfig:
    """The same run on one process: its layout is of those that trained it, not of those that read it."""
    return config.model_copy(update={"parallel": Parallel(), "launch": Launch()})


def read_config(run_dir: Path) -> RunConfig:
    """The config of a run; its newest checkpoint's where config.json is damaged. ValueError where there is neither."""
    path, newest = run_dir / "config.json", newest_checkpoint(run_dir)
    if not path.is_file() and newest is None:
        raise ValueError(f"{run_dir} is not a run directory: it holds no config.json")
    try:
        return RunConfig.model_validate_json(path.read_text())
    except (OSError, ValueError) as error:
        if newest is None:
            raise ValueError(
                f"{path} is damaged or of another version ({_reason(error)}); there is no checkpoint to lose: delete "
                f"{run_dir} and start the run again"
            ) from error
    kept = checkpoint.read_manifest(newest)["facts"].get("config")
    try:
        return RunConfig.model_validate_json(json.dumps(kept))
    except ValidationError as error:
        raise ValueError(
            f"{path} cannot be read, and the config in {newest} is not of this version ({_reason(error)}); use the "
            "version of vidit that environment.json names, or restore config.json"
        ) from error


def _reason(error: Exception) -> str:
    return "; ".join(faults_of(error)) if isinstance(error, ValidationError) else str(error)


def open_run(config: RunConfig, data: Mapping[str, Any]) -> Path | None:
    """Write what describes this start, or refuse one that does not continue the run in its directory.

    `data` holds the fingerprints of the clips, as the checkpoints of this start will. Returns the checkpoint to
    resume from. Raises ConfigError naming everything that differs and may not, both ways.
    """
    run_dir = config.directory
    newest = newest_checkpoint(run_dir)
    if newest is not None:
        kept = _newest_facts(run_dir).get("data", data)
        # Another cut of the same folder is another set of clips too: the option that made it is the fault to name.
        faults = list(_changes(read_config(run_dir), config)) or list(_data_faults(config, kept, data))
        if faults:
            raise ConfigError([f"{fault}; {run_dir} holds another run: give the old value, or a new run_dir"
                               for fault in faults])  # fmt: skip
    write_whole(run_dir / "config.json", config.to_json() + "\n")
    write_whole(run_dir / "environment.json", json.dumps(environment(), indent=1) + "\n")
    diff = _diff()
    if diff:
        write_whole(run_dir / "source.diff", diff)
    else:
        (run_dir / "source.diff").unlink(missing_ok=True)
    return newest


def _newest_facts(run_dir: Path) -> dict[str, Any]:
    """Of the newest checkpoint with a manifest that can be read."""
    root = run_dir / "checkpoints"
    for step in reversed(checkpoint.steps(root)):
        with suppress(checkpoint.DamagedError):
            return dict(checkpoint.read_manifest(checkpoint.folder_of(root, step))["facts"])
    return {}


def _changes(old: RunConfig, new: RunConfig) -> Iterator[str]:
    before, after = flat(old), flat(new)
    for key in after:
        if before.get(key) == after[key] or key in FREE or key.startswith(FREE_SECTIONS):
            continue
        # Without these the rows of a step are the same, cut elsewhere.
        counted = "data.image_rows" if new.data.image_rows else "data.buckets" if new.data.buckets else ""
        if key == "train.micro_batch" and not counted:
            continue
        fault = f"{key}: the run has {before.get(key)!r}, this config {after[key]!r}"
        if key == "train.micro_batch":
            fault += f", and {counted} says what each micro-batch holds"
        if key != "train.steps":
            yield fault
        elif new.train.schedule != "constant":
            yield f"{fault}, and train.schedule={new.train.schedule} is laid out over all steps from the first on"


def _data_faults(config: RunConfig, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for split, folder in (("train", config.data.train), ("validation", config.data.validation or config.data.train)):
        before, after = old[split], new[split]
        what = "tars" if config.data.streaming and split == "train" else "clips"
        if before != after:
            yield (
                f"data.{split}: the run has {before['num_clips']} {what} of fingerprint {before['sha256'][:12]}, "
                f"{folder} gives {after['num_clips']} of {after['sha256'][:12]}; it may be moved, not packed anew"
            )


def environment() -> dict[str, Any]:
    """Versions, machine, commit and command of this process."""
    return {
        "vidit": vidit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def keep_vae(config: RunConfig) -> RunConfig:
    """Copy the VAE into the run, so that the run can be sampled wherever it is; returns the config that uses it.

    Raises ConfigError where the run has a checkpoint that was trained on other weights than are given now.
    """
    source, target = vae_folder(config.vae), config.directory / "vae"
    if newest_checkpoint(config.directory) and all((target / name).is_file() for name in vae_files(target)):
        if not is_same_vae(source, target):
            raise ConfigError(
                [f"vae.weights={source} is another VAE than the run was started with; give vae.weights={target}"]
            )
    elif source.resolve() != target.resolve():
        target.mkdir(exist_ok=True)
        for name in vae_files(source):
            write_whole(target / name, (source / name).read_bytes())
        if config.vae.revision:
            write_whole(target / ORIGIN, json.dumps(origin_of(config.vae)) + "\n")
    return with_vae(config, target)


def _commit() -> str:
    """Of the source tree, or of what a job's copy of it was taken from (`launch/snapshot.py`)."""
    kept = SOURCE / "commit"
    return (kept.read_text() if kept.is_file() else _git("rev-parse", "HEAD")).strip()


def _diff() -> str:
    kept = SOURCE / "source.diff"
    return kept.read_text(errors="replace") if kept.is_file() else _git("diff", "HEAD")


def _git(*arguments: str) -> str:
    """Output of git in the source tree; empty where there is no repository or no git."""
    if not (SOURCE / ".git").exists():  # git would find one above a copy: the runs may lie in a clone
        return ""
    try:
        done = subprocess.run(
            ["git", "-C", str(SOURCE), *arguments], capture_output=True, encoding="utf-8", errors="replace", timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
