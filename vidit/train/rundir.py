"""The run directory: what is written there besides checkpoints and metrics.

config.json        the resolved config; a resume with another one is refused where it would not fit
environment.json   versions, host, commit, command
source.diff        uncommitted changes of the source tree, when there are any
data.json          clips used, dropped (with the reason) and cropped
vae/, text.json    the frozen VAE that the run was trained on
checkpoints/       step-XXXXXXXX/
metrics.jsonl, tensorboard/, samples/
costs.jsonl        wall time and peak memory of each start
"""

import filecmp
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

import vidit
from vidit.config import ConfigError, RunConfig

# Fields that may change between two starts of one run: they say where and how long, not what.
FREE = {
    "run_dir", "train.steps", "train.device", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints",
    "train.validate_every", "train.sample_every", "train.compile", "train.activation_checkpointing",
    "data.train", "data.validation", "data.num_workers", "data.prefetch", "data.max_skipped", "vae.weights",
}  # fmt: skip


def read_config(run_dir: Path) -> RunConfig:
    """The config of a run. ValueError where the folder is no run."""
    path = run_dir / "config.json"
    if not path.is_file():
        raise ValueError(f"{run_dir} is not a run directory: it holds no config.json")
    try:
        return RunConfig.model_validate_json(path.read_text())
    except ValidationError as error:
        raise ValueError(f"{path} is not a config of this version: {error}") from error


def open_run(config: RunConfig, has_checkpoint: bool) -> None:
    """Create the run directory, or check that the config continues the run that is there.

    Raises ConfigError naming every field that differs and may not, with both values.
    """
    run_dir = config.directory
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "config.json"
    if path.is_file() and has_checkpoint:
        faults = _changes(read_config(run_dir), config)
        if faults:
            raise ConfigError([f"{fault}; {run_dir} holds another run: give the old value, or a new run_dir"
                               for fault in faults])  # fmt: skip
    path.write_text(config.to_json() + "\n")
    (run_dir / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
    diff = _git("diff", "HEAD")
    if diff:
        (run_dir / "source.diff").write_text(diff)


def _changes(old: RunConfig, new: RunConfig) -> list[str]:
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return [
        f"{key}: the run has {before.get(key)!r}, this config {after[key]!r}"
        for key in after
        if key not in FREE and before.get(key) != after[key]
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def environment() -> dict[str, Any]:
    """Versions, machine, commit and command of this process."""
    return {
        "vidit": vidit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _git("rev-parse", "HEAD").strip(),
        "command": sys.argv,
    }


def keep_vae(config: RunConfig) -> RunConfig:
    """Copy the VAE into the run, so that the run can be sampled wherever it is; returns the config that uses it.

    Raises ConfigError where the run has a checkpoint that was trained on other weights than are given now.
    """
    source, target = Path(config.vae.weights or ""), config.directory / "vae"
    weights = target / "model.safetensors"
    if weights.is_file() and any((config.directory / "checkpoints").glob("step-*/manifest.json")):
        if not filecmp.cmp(source / weights.name, weights, shallow=False):
            raise ConfigError(
                [f"vae.weights={source} is another VAE than the run was started with; give vae.weights={target}"]
            )
    elif source.resolve() != target.resolve():
        target.mkdir(exist_ok=True)
        for name in ("config.json", weights.name):
            shutil.copyfile(source / name, target / name)
    return config.model_copy(update={"vae": config.vae.model_copy(update={"weights": str(target)})})


def record_cost(run_dir: Path, stage: str, seconds: float, step: int, peak_rss_gib: float) -> None:
    """Append the wall time and peak memory of one start to costs.jsonl."""
    row = {"stage": stage, "step": step, "seconds": round(seconds, 3), "peak_rss_gib": round(peak_rss_gib, 4)}
    with (run_dir / "costs.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def _git(*arguments: str) -> str:
    """Output of git in the source tree; empty where there is no repository or no git."""
    root = Path(vidit.__file__).parent.parent
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
