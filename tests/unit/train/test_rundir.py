"""The run directory: what a resume may change, and what it says of what it may not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel import checkpoint
from vidit.config import ConfigError, RunConfig
from vidit.data.scene_pack import pack_scenes
from vidit.train import rundir
from vidit.train.lock import run_lock
from vidit.train.run import run
from vidit.train.rundir import keep_vae, newest_checkpoint, open_run, read_config

Configure = Callable[..., RunConfig]
DATA = {"train": {"num_clips": 9, "sha256": "a" * 64}, "validation": {"num_clips": 2, "sha256": "b" * 64}}


def begin(config: RunConfig, data: dict[str, Any] = DATA) -> Path:
    """A run with a checkpoint of step 3."""
    config.directory.mkdir(parents=True, exist_ok=True)
    open_run(config, data)
    facts = {"config": config.model_dump(mode="json"), "data": data}
    return checkpoint.save(config.directory / "checkpoints", 3, {"x": torch.zeros(1)}, facts)


def faults(config: RunConfig, data: dict[str, Any] = DATA) -> str:
    before = (config.directory / "config.json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        open_run(config, data)
    assert (config.directory / "config.json").read_bytes() == before
    return str(caught.value)


def test_what_a_resume_may_change(configure: Configure, tmp_path: Path) -> None:
    begin(configure(tmp_path))
    other = configure(
        tmp_path,
        data={"train": "elsewhere", "num_workers": 3, "max_skipped": 0.5},
        train={"steps": 60, "checkpoint_every": 1, "validate_every": 2, "activation_checkpointing": "full"},
        sample={"num_steps": 3, "guidance": 1.5, "sampler": "heun", "prompts": ("x", "y"), "micro_batch": 1},
    )
    assert open_run(other, DATA) == checkpoint.folder_of(tmp_path / "checkpoints", 3)
    assert read_config(tmp_path) == other


def test_what_it_may_not(configure: Configure, tmp_path: Path) -> None:
    begin(configure(tmp_path))
    message = faults(configure(tmp_path, model={"width": 64}, train={"seed": 5}, data={"num_validation": 3}))
    for text in ("model.width: the run has 32, this config 64;", "train.seed: the run has 0, this config 5;"):
        assert text in message
    assert "data.num_validation: the run has 4, this config 3; " in message
    assert "give the old value, or a new run_dir" in message


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"image_rows": 1}, "data.image_rows says"),
        ({"buckets": [{"num_frames": 5, "height": 32, "width": 32}]}, "data.buckets says"),
        ({}, ""),
    ],
)
def test_rows_that_are_counted_by_the_micro_batch(configure: Configure, tmp_path: Path, data: dict, why: str) -> None:
    begin(configure(tmp_path, data=data))
    other = configure(tmp_path, data=data, train={"micro_batch": 4})
    if why:
        assert f"train.micro_batch: the run has 2, this config 4, and {why}" in faults(other)
    else:
        open_run(other, DATA)


def test_the_length_of_a_cosine_is_fixed(configure: Configure, tmp_path: Path) -> None:
    begin(configure(tmp_path, train={"schedule": "cosine"}))
    message = faults(configure(tmp_path, train={"schedule": "cosine", "steps": 9}))
    assert "train.steps: the run has 6, this config 9, and train.schedule=cosine is laid out over all steps" in message
    assert "give the old value, or a new run_dir" in message
    open_run(configure(tmp_path, train={"schedule": "cosine"}), DATA)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_other_clips_are_refused_with_both_fingerprints(configure: Configure, tmp_path: Path, split: str) -> None:
    config = configure(tmp_path)
    begin(config)
    message = faults(config, DATA | {split: {"num_clips": 7, "sha256": "c" * 64}})
    assert message.startswith(f"data.{split}: the run has {DATA[split]['num_clips']} clips of fingerprint ")
    assert f"{config.data.train} gives 7 of cccccccccccc; it may be moved, not packed anew" in message
    assert "or a new run_dir" in message
    other = faults(configure(tmp_path, data={"num_validation": 1}), DATA | {split: {"num_clips": 7, "sha256": "c"}})
    assert other.startswith("data.num_validation: the run has 4, this config 1; "), "the one cause"
    assert "fingerprint" not in other


def test_another_dataset_through_a_whole_run(configure: Configure, tiny_clips: Path, tmp_path: Path) -> None:
    """Moved: goes on. Of the same size and names, packed from another seed: refused."""
    quiet = {"sample": {"prompts": ()}, "train": {"steps": 3}}
    assert run(configure(tmp_path / "run", **quiet))
    shutil.copytree(tiny_clips, tmp_path / "moved")
    longer = quiet | {"train": {"steps": 4}}
    assert run(configure(tmp_path / "run", **longer, data={"train": str(tmp_path / "moved")}))
    pack_scenes(tmp_path / "other", 16, "train", 1, num_frames=5, height=32, width=32, workers=0)
    with pytest.raises(ConfigError, match=r"2 faults:\n- data\.train: the run has 12 clips of fingerprint "):
        run(configure(tmp_path / "run", **longer, data={"train": str(tmp_path / "other")}))


@pytest.mark.parametrize(
    "damage", [b"", b'{"name": "tiny", "run_', b"\xff\xfe", b'{"name": "tiny", "trian": {}}', None]
)
def test_a_damaged_config_is_taken_from_the_checkpoint(
    configure: Configure, tmp_path: Path, damage: bytes | None
) -> None:
    config = configure(tmp_path)
    begin(config)
    path = tmp_path / "config.json"
    path.write_bytes(damage) if damage is not None else path.unlink()
    assert read_config(tmp_path) == config
    with pytest.raises(ConfigError, match=r"model\.width: the run has 32, this config 64"):
        open_run(configure(tmp_path, model={"width": 64}), DATA)
    open_run(config, DATA)
    assert RunConfig.model_validate_json(path.read_text()) == config


def test_a_damaged_config_without_a_checkpoint(configure: Configure, tmp_path: Path) -> None:
    config = configure(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged or of another version .* start the run again"):
        read_config(tmp_path)
    assert open_run(config, DATA) is None
    assert read_config(tmp_path) == config
    with pytest.raises(ValueError, match=r"is not a run directory: it holds no config\.json"):
        read_config(tmp_path / "none")


def test_a_diff_of_an_earlier_start_goes(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(tmp_path)
    for diff in ("+ a line\n", ""):
        monkeypatch.setattr(rundir, "_git", lambda *_, text=diff: text)
        open_run(config, DATA)
        assert (tmp_path / "source.diff").exists() == bool(diff)


def test_a_run_goes_on_without_the_folder_its_vae_came_from(
    configure: Configure, tiny_vae: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_vae, tmp_path / "vae"))

    def config(steps: int) -> RunConfig:
        tree = configure(tmp_path / "run", train={"steps": steps}, sample={"prompts": ()})
        return tree.model_copy(update={"vae": tree.vae.model_copy(update={"weights": str(source)})})

    assert run(config(2))
    shutil.rmtree(source)
    assert run(config(3))
    assert newest_checkpoint(tmp_path / "run") == checkpoint.folder_of(tmp_path / "run" / "checkpoints", 3)
    with pytest.raises(ConfigError, match="holds no config"):
        run(config(3).model_copy(update={"run_dir": str(tmp_path / "fresh")}))


def test_the_kept_vae_is_whole_or_the_old_one(configure: Configure, tmp_path: Path) -> None:
    config = configure(tmp_path)
    kept = keep_vae(config)
    assert kept.vae.weights == str(tmp_path / "vae")
    assert {path.name for path in (tmp_path / "vae").iterdir()} == {"config.json", "model.safetensors"}


def test_a_start_that_fails_is_in_the_costs(configure: Configure, tmp_path: Path) -> None:
    train = {"learning_rate": 1e30, "checkpoint_every": 1, "ema_decay": 0.0}
    with pytest.raises(RuntimeError, match="not finite"):
        run(configure(tmp_path, train=train, sample={"prompts": ()}))
    (row,) = (json.loads(line) for line in (tmp_path / "costs.jsonl").read_text().splitlines())
    assert (row["stage"], row["step"]) == ("train", 1)
    assert row["seconds"] > 0


def test_a_refused_start_writes_nothing(configure: Configure, tmp_path: Path) -> None:
    config = configure(tmp_path)
    begin(config)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError):
        run(configure(tmp_path, model={"width": 64}))
    assert {path.name for path in tmp_path.iterdir()} == before | {"lock"}


def test_a_second_start_at_once_touches_nothing(configure: Configure, tmp_path: Path) -> None:
    config = configure(tmp_path)
    begin(config)
    (tmp_path / "checkpoints" / "step-00000009.partial").mkdir()
    with run_lock(tmp_path):
        before = {str(path): path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        with pytest.raises(RuntimeError, match="is being trained by process"):
            run(config)
        assert {str(path): path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
