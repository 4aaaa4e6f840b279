"""A U-Net is trained, resumed, sampled and exported as a DiT is; images first, then video upon them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vidit.config import UNET_FAMILIES, ConfigError, RunConfig
from vidit.export.weights import export_weights
from vidit.model.windows import Grid
from vidit.sample.run import sample_run
from vidit.text.encoder import build_text_encoder
from vidit.train.layout import with_layout
from vidit.train.metrics import read_metrics
from vidit.train.parallelize import build_dit
from vidit.train.run import run
from vidit.vae.stored import adopt_vae

Configure = Callable[..., RunConfig]
SMALL: dict[str, Any] = {
    "channels": 8, "multipliers": (1, 2), "num_res_blocks": 1, "attention": (True, False), "head_dim": 4,
    "norm_groups": 4,
}  # fmt: skip
SVD: dict[str, Any] = {
    "path": "edm",
    "target": "edm",
    "density": "log_normal",
    "density_mean": -1.2,
    "density_std": 1.0,
}
IMAGEN: dict[str, Any] = {"path": "vp", "target": "v", "density": "uniform", "vp_schedule": "cosine"}
MODELSCOPE: dict[str, Any] = {"path": "vp", "target": "eps", "density": "uniform", "zero_terminal_snr": False}
BASELINES = {"vdm": IMAGEN, "make-a-video": MODELSCOPE, "modelscope": MODELSCOPE, "video-ldm": SVD}
TEMPORAL = ".temporal_"


@pytest.fixture
def made(configure: Configure, tmp_path: Path) -> Configure:
    """(name of the run, family, **sections) -> a tiny run of a U-Net."""

    def build(name: str, family: str, **sections: Any) -> RunConfig:
        unet = {**SMALL, **UNET_FAMILIES.get(family, {"temporal": "none"}), **sections.pop("unet", {})}
        train = {"task": "unet", **sections.pop("train", {})}
        diffusion = sections.pop("diffusion", BASELINES.get(family, SVD))
        return configure(tmp_path / name, train=train, model={}, unet=unet, diffusion=diffusion, **sections)

    def without_model(name: str, family: str, **sections: Any) -> RunConfig:
        tree = build(name, family, **sections).model_dump(exclude_unset=True)
        tree.pop("model")
        return RunConfig.model_validate(tree)

    return without_model


def losses(config: RunConfig) -> list[float]:
    assert run(config)
    return [row["loss"] for row in read_metrics(config.directory) if "loss" in row]


def built(config: RunConfig) -> nn.ModuleDict:
    config = adopt_vae(config, 1)
    return build_dit(config, build_text_encoder(config.text, torch.float32), torch.device("cpu"), torch.float32)


def hashes(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for name, t in tensors.items()}


def exported(config: RunConfig, out: Path) -> dict[str, Tensor]:
    export_weights(config.directory, out, "model")
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("family", BASELINES)
def test_train_resume_and_sample(family: str, made: Configure, tmp_path: Path) -> None:
    whole = losses(made("whole", family, data={"image_rows": 1}))
    assert len(whole) == 6
    rows = read_metrics(tmp_path / "whole")
    assert [row["step"] for row in rows if "validation" in row] == [3, 6]
    assert losses(made("resumed", family, data={"image_rows": 1}, train={"steps": 3})) == whole[:3]
    assert losses(made("resumed", family, data={"image_rows": 1})) == whole
    mp4, gif = sample_run(tmp_path / "resumed", ["a red circle"], tmp_path / "out", 0, ["sample.num_steps=1"])
    assert mp4.is_file()
    assert gif.is_file()


def test_it_learns(made: Configure) -> None:
    """On procedural clips: the loss of fixed noise and times falls."""
    family = "video-ldm"
    train = {"steps": 60, "validate_every": 20, "checkpoint_every": 60, "ema_decay": 0.9, "learning_rate": 1e-2}
    config = made("learns", family, train=train, sample={"prompts": ()})
    values = losses(config)
    assert sum(values[-20:]) < 0.95 * sum(values[:20])
    first, _, last = (row["validation"]["loss"] for row in read_metrics(config.directory) if "validation" in row)
    assert last < 0.97 * first


@pytest.mark.parametrize("family", BASELINES)
def test_images_then_video_with_the_image_layers_frozen(
    family: str, made: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diffusion, told = BASELINES[family], family in ("make-a-video", "video-ldm")
    images = made("images", "none", diffusion=diffusion, data={"num_frames": 1}, train={"learning_rate": 1e-2})
    assert run(images)
    start = exported(images, tmp_path / "weights")
    trainable = ("unet.*.temporal_*", "unet.frame_rate.*")[: 1 + told]
    train = {"init_from": str(tmp_path / "weights"), "trainable": trainable, "learning_rate": 1e-2}
    config = made("video", family, train=train, unet={"frame_rate": told})

    image, video = built(images.model_copy(update={"run_dir": str(tmp_path / "none")})), built(config)
    image.load_state_dict(start)
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 3, 7, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    given = (
        x,
        Grid(3, 7, 8, fps_B=torch.tensor([8.0, 24.0])),
        torch.tensor([100.0, 700.0]),
        text,
        torch.full((2, 5), -1),
        text.mean(1),
    )
    assert bool(image["unet"](*given).any())
    assert torch.equal(video["unet"](*given), image["unet"](*given)), "a video model begins as its image model"

    capsys.readouterr()
    assert run(config)
    notes = [line for line in capsys.readouterr().out.splitlines() if "begins by adding zero" in line]
    assert ["unet.frame_rate," in note for note in notes] == [False, True][: 1 + told]
    note = notes[0]
    layers = {name.partition(TEMPORAL)[0] for name, _ in video.named_parameters() if TEMPORAL in name}
    assert all(layer + TEMPORAL in note for layer in layers)
    end = exported(config, tmp_path / "tuned")
    assert hashes({name: end[name] for name in start}) == hashes(start)
    new = [name for name in end if name not in start]
    assert new
    assert all(TEMPORAL in name or "frame_rate" in name for name in new)
    assert any("frame_rate" in name for name in new) == told
    assert any(bool(end[name].any()) for name in new if "closing" in name or "parts" in name)
    # Samples are of the trained weights, frozen ones included.
    videos = list(sample_run(tmp_path / "video", ["a"], tmp_path / "out", 0, ["sample.num_steps=1"]))
    assert len(videos) == 2


def test_a_video_model_is_not_taken_for_an_image_model(made: Configure, tmp_path: Path) -> None:
    """Layers over time of another family are missing, not new."""
    video = made("video", "vdm", train={"steps": 1})
    assert run(video)
    exported(video, tmp_path / "weights")
    other = made("other", "modelscope", diffusion=IMAGEN, train={"init_from": str(tmp_path / "weights")})
    with pytest.raises(ValueError, match=r"missing: unet\.down\.0\.cells\.0\.temporal_attention\.parts\.1"):
        built(other)


@pytest.mark.parametrize("axis", ["pipeline", "tensor", "sequence"])
def test_layouts_that_divide_a_model_are_refused(axis: str, made: Configure) -> None:
    config = made("layout", "vdm", parallel={axis: 2})
    with pytest.raises(ConfigError, match=rf"parallel\.{axis}=2 does not apply to train\.task=unet, which takes data"):
        with_layout(adopt_vae(config, 2), 2)


def test_what_a_unet_has_no_use_for_is_refused(made: Configure, configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.optimizer=muon is for the matrices of transformer blocks"):
        run(made("muon", "vdm", train={"optimizer": "muon"}))
    with pytest.raises(ConfigError, match=r"model\.num_layers=2.* no effect without train\.task=dit"):
        run(configure(tmp_path / "both", train={"task": "unet"}))
    with pytest.raises(ConfigError, match=r"unet\.channels=64 has no effect without train\.task=unet"):
        run(configure(tmp_path / "dit", unet={"channels": 64}))


def test_samples_longer_than_the_table_of_places_are_refused(made: Configure, tmp_path: Path) -> None:
    assert run(made("run", "vdm", train={"steps": 1}))
    asked = ["data.num_frames=9", "data.height=16", "sample.num_steps=1"]
    with pytest.raises(ConfigError, match=r"data\.num_frames=9 is 5 tokens.*unet\.temporal_position=sinusoid"):
        list(sample_run(tmp_path / "run", ["a"], tmp_path / "out", 0, asked))
    assert list(sample_run(tmp_path / "run", ["a"], tmp_path / "out", 0, asked[1:]))
