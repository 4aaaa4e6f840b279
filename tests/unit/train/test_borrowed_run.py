"""A denoiser of ours on frozen VAEs of diffusers: on videos and on latents alike, resumed, sampled; others refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vidit.config import ConfigError, RunConfig
from vidit.data.scene_pack import pack_scenes
from vidit.data.video import decode_clip
from vidit.export.programs import export_vae
from vidit.sample.run import sample_run
from vidit.train.encode_run import encode_run
from vidit.train.metrics import read_metrics
from vidit.train.run import run

diffusers: Any = pytest.importorskip("diffusers")
WIDTHS: dict[str, Any] = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2, "latent_channels": 4}
MODELS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {
        "block_out_channels": (4, 4), "norm_num_groups": 2, "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    "AutoencoderKLCogVideoX": WIDTHS | {"layers_per_block": 1},
    "AutoencoderKLHunyuanVideo": WIDTHS | {"layers_per_block": 1},
    "AutoencoderKLWan": {
        "base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
        "latents_mean": [-0.7, 0.2, 0.1, 1.5], "latents_std": [2.8, 1.4, 2.3, 0.5],
    },
}  # fmt: skip
Build = Callable[..., RunConfig]


def save(kind: str, folder: Path, seed: int = 3) -> Path:
    torch.manual_seed(seed)
    getattr(diffusers, kind)(**MODELS[kind]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 procedural clips of 9 frames of 32x32."""
    folder = tmp_path_factory.mktemp("clips")
    pack_scenes(folder, 8, "train", 0, num_frames=9, height=32, width=32, workers=0)
    return folder


@pytest.fixture
def build(configure: Build, clips: Path, tmp_path: Path) -> Build:
    """(name of the run, VAE, steps, **data) -> a tiny run on it."""

    def made(name: str, vae: Path, steps: int = 3, **data: Any) -> RunConfig:
        train = {"steps": steps, "checkpoint_every": 2, "schedule": "constant"}
        data = {"train": str(clips), "num_frames": 9, "num_validation": 0} | data
        return configure(tmp_path / name, vae={"weights": str(vae)}, train=train, data=data, sample={"prompts": ()})

    return made


def losses(config: RunConfig) -> list[float]:
    assert run(config)
    return [row["loss"] for row in read_metrics(config.directory) if "loss" in row]


@pytest.mark.parametrize("kind", MODELS)
def test_train_encode_resume_and_sample(kind: str, build: Build, tmp_path: Path) -> None:
    vae = save(kind, tmp_path / "vae")
    whole = losses(build("whole", vae))
    assert len(whole) == 3
    report = encode_run(build("encoded", vae), tmp_path / "latents", "fp32")
    assert (report.num_clips, report.skipped) == (8, [])
    assert losses(build("encoded", vae, train=str(tmp_path / "latents"))) == pytest.approx(whole, rel=1e-6)
    assert losses(build("resumed", vae, 2)) == whole[:2]
    shutil.rmtree(vae)  # what a run needs is in its directory
    assert losses(build("resumed", vae)) == whole
    assert json.loads((tmp_path / "resumed" / "vae" / "config.json").read_text())["_class_name"] == kind
    mp4, gif = sample_run(tmp_path / "resumed", ["a red circle"], tmp_path / "out", 0, ["sample.num_steps=1"])
    frames = decode_clip(mp4.read_bytes(), num_frames=9, height=32, width=32, fps=0.0)
    assert frames.shape == (9, 32, 32, 3)
    assert gif.is_file()
    with pytest.raises(ConfigError, match=r"vae.tile=6 is not divisible"):
        list(sample_run(tmp_path / "resumed", ["a"], tmp_path / "out", 0, ["vae.tile=6"]))


def test_another_vae_is_refused(build: Build, tmp_path: Path) -> None:
    kind = "AutoencoderKLWan"
    vae, other = save(kind, tmp_path / "vae"), save(kind, tmp_path / "vae4", seed=4)
    encode_run(build("made", vae), tmp_path / "latents", "fp32")
    with pytest.raises(ConfigError, match=r"latents was encoded by the VAE .*vae .*the run has"):
        run(build("other", other, train=str(tmp_path / "latents")))
    assert run(build("run", vae, 2))
    with pytest.raises(ConfigError, match="is another VAE than the run was started with"):
        run(build("run", other))
    # The same weights with other statistics whiten otherwise, and are another VAE to a run.
    config = vae / "config.json"
    facts = json.loads(config.read_text())
    config.write_text(json.dumps(facts | {"latents_mean": [0.0] * 4}))
    with pytest.raises(ConfigError, match="is another VAE than the run was started with"):
        run(build("run", vae))
    config.write_text(json.dumps(facts | {"_diffusers_version": "0.99"}))
    assert run(build("run", vae))


def test_images_are_not_first_frames_of_stored_clips(build: Build, tmp_path: Path) -> None:
    vae = save("AutoencoderKLCogVideoX", tmp_path / "vae")
    encode_run(build("made", vae), tmp_path / "latents", "fp32")
    with pytest.raises(ConfigError, match=r"AutoencoderKLCogVideoX has seen other frames: data.image_rows=1"):
        run(build("run", vae, train=str(tmp_path / "latents"), image_rows=1))
    assert run(build("videos", vae, 1, image_rows=1))


def test_a_hub_name_is_asked_for_once(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run resumes on its own copy; another commit is looked up again, and so is not taken for it."""
    commit, other = "0123456789" * 4, "abcdef0123" * 4
    hub = tmp_path / "hub"
    save("AutoencoderKLWan", hub / "models--someone--wan" / "snapshots" / commit / "vae")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def named(steps: int, revision: str = commit) -> RunConfig:
        config = build("run", Path("someone/wan"), steps)
        return config.model_copy(update={"vae": config.vae.model_copy(update={"revision": revision})})

    assert run(named(1))
    shutil.rmtree(hub)
    assert run(named(2))
    with pytest.raises(ConfigError, match="cannot be fetched"):
        run(named(3, other))
    assert run(named(3))


def test_it_is_no_program_of_ours(tmp_path: Path) -> None:
    vae = save("AutoencoderKLWan", tmp_path / "vae")
    with pytest.raises(ValueError, match="is a AutoencoderKLWan of diffusers"):
        export_vae(vae, tmp_path / "out")
