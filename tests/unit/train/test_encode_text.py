"""Stored text of a frozen encoder: the run is the run that encodes captions itself, and another encoder is refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from tests.text_models import save_text_models, tiny_model
from vidit.config import ConfigError, RunConfig, Text
from vidit.data.encoded import read_encoding
from vidit.data.shards import read_clip, read_index
from vidit.sample.run import open_trained
from vidit.text.encoder import build_text_encoder
from vidit.text.pretrained import PretrainedTextEncoder
from vidit.train.encode_run import encode_run
from vidit.train.metrics import read_metrics
from vidit.train.run import run

Configure = Callable[..., RunConfig]
LENGTH = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_text_models(tmp_path_factory.mktemp("text"))


def with_text(config: RunConfig, **text: Any) -> RunConfig:
    tree = config.model_dump(exclude_defaults=True)
    return RunConfig.model_validate({**tree, "text": {"max_tokens": LENGTH, **text}})


@pytest.fixture
def build(configure: Configure, folders: dict[str, Path]) -> Callable[..., RunConfig]:
    def build(run_dir: Path, kind: str, path: Path | None = None, **data: Any) -> RunConfig:
        config = configure(
            run_dir, data={"caption_dropout": 0.5, "image_rows": 1, **data}, sample={"prompts": ()},
            train={"micro_batch": 3, "global_batch": 6, "steps": 4}, model={"cross_attention": "all"},
        )  # fmt: skip
        return with_text(config, kind=kind, path=str(path or folders[kind]))

    return build


def losses(config: RunConfig) -> list[float]:
    assert run(config)
    return [row["loss"] for row in read_metrics(config.directory) if "loss" in row]


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_stored_text_gives_the_same_run(build: Callable[..., RunConfig], tmp_path: Path, kind: str) -> None:
    """Dropped captions, rows of images and CLIP's pooled text included; while training the encoder is never called."""
    direct = build(tmp_path / "direct", kind)
    encode_run(direct, tmp_path / "out", "fp32")
    expected = losses(direct)
    config = build(tmp_path / "run", kind, train=str(tmp_path / "out"))
    with patch.object(PretrainedTextEncoder, "forward", side_effect=AssertionError("the text is stored")):
        assert losses(config) == pytest.approx(expected, rel=5e-6)


def test_what_is_stored(build: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = build(tmp_path, "clip")
    encode_run(config, tmp_path / "out", "fp32")
    encoder = build_text_encoder(config.text)
    ref = read_index(tmp_path / "out")[3]
    content, caption, _ = read_clip(ref)
    tensors, expected = load(content), encoder(encoder.tokenize([caption]))
    count = int(expected.mask_BL.sum())
    assert tensors["text"].shape == (count, 16)
    torch.testing.assert_close(tensors["text"], expected.features_BLD[0, :count], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tensors["pooled"], expected.pooled_BD[0], rtol=1e-4, atol=1e-5)
    encoding = read_encoding(tmp_path / "out")
    assert encoding is not None
    assert encoding.empty is not None
    empty = encoder(encoder.tokenize([""]))
    torch.testing.assert_close(encoding.empty.pooled, empty.pooled_BD[0], rtol=1e-4, atol=1e-5)
    assert len(encoding.empty.features) == int(empty.mask_BL.sum())


def test_videos_beside_stored_text(build: Callable[..., RunConfig], tiny_clips: Path, tmp_path: Path) -> None:
    """In a mixture, and a raw validation: captions that have no text yet are encoded beside those that have."""
    other = Path(shutil.copytree(tiny_clips, tmp_path / "other"))
    encode_run(build(tmp_path, "t5", train=str(other)), tmp_path / "latents", "fp32")
    found = []
    for number, second in enumerate((other, tmp_path / "latents")):
        mixture = tuple({"path": str(path), "weight": 1} for path in (tiny_clips, second))
        config = build(
            tmp_path / str(number), "t5", train="", mixture=mixture, validation=str(tiny_clips), num_validation=3
        )
        found.append(losses(config))
    assert found[1] == pytest.approx(found[0], rel=5e-6)


def test_another_encoder_is_refused(build: Callable[..., RunConfig], folders: dict[str, Path], tmp_path: Path) -> None:
    encode_run(build(tmp_path, "t5"), tmp_path / "out")
    moved = Path(shutil.copytree(folders["t5"], tmp_path / "moved"))
    assert losses(build(tmp_path / "one", "t5", moved, train=str(tmp_path / "out")))
    weights = load_file(moved / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 0.1}, moved / "model.safetensors", {"format": "pt"})
    for config in (
        build(tmp_path / "two", "t5", moved, train=str(tmp_path / "out")),
        build(tmp_path / "two", "umt5", train=str(tmp_path / "out")),
        with_text(
            build(tmp_path / "two", "t5", train=str(tmp_path / "out")),
            kind="t5", path=str(folders["t5"]), max_tokens=LENGTH - 1,
        ),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=re.escape(f"holds the text of t5 {folders['t5']} (")) as caught:
            run(config)
        assert f"the run has {config.text.kind} {config.text.path} (" in str(caught.value)


def test_captions_are_stored_too(build: Callable[..., RunConfig], configure: Configure, tmp_path: Path) -> None:
    """Latents without text serve any encoder, and latents with text one that is trained."""
    plain = configure(tmp_path, sample={"prompts": ()})
    encode_run(plain, tmp_path / "plain", "fp32")
    expected = losses(build(tmp_path / "direct", "t5"))
    assert losses(build(tmp_path / "run", "t5", train=str(tmp_path / "plain"))) == pytest.approx(expected, rel=5e-6)
    encode_run(build(tmp_path, "t5"), tmp_path / "text", "fp32")
    changes: dict[str, Any] = {"sample": {"prompts": ()}, "train": {"steps": 3}}
    direct = losses(configure(tmp_path / "bytes", **changes))
    trained = configure(tmp_path / "trained", data={"train": str(tmp_path / "text")}, **changes)
    assert losses(trained) == pytest.approx(direct, rel=5e-6)


@pytest.fixture(scope="module")
def narrow_clip(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP whose features are not as wide as those of the other encoders."""
    folder = Path(shutil.copytree(folders["clip"], tmp_path_factory.mktemp("narrow") / "clip"))
    tiny_model("clip", 12).save_pretrained(folder)
    return folder


def paired(config: RunConfig, first: Path, second: Path, cross_text: str, **more: Any) -> RunConfig:
    """With T5, and CLIP beside it."""
    beside = {"kind": "clip", "path": str(second), "max_tokens": 12, **more}
    found = with_text(config, kind="t5", path=str(first), second=beside)
    return found.model_copy(update={"model": found.model.model_copy(update={"cross_text": cross_text})})


@pytest.mark.parametrize("cross_text", ["first", "interleaved"])
def test_two_encoders(
    build: Callable[..., RunConfig], folders: dict[str, Path], narrow_clip: Path, tmp_path: Path, cross_text: str
) -> None:
    """What both give is stored, as far as the model reads it, and gives the losses of captions encoded on the way."""

    def two(name: str, **data: Any) -> RunConfig:
        return paired(build(tmp_path / name, "t5", **data), folders["t5"], narrow_clip, cross_text)

    direct, stored = two("direct"), two("run", train=str(tmp_path / "out"))
    expected = losses(direct)
    encode_run(direct, tmp_path / "out", "fp32")
    content, caption, _ = read_clip(read_index(tmp_path / "out")[3])
    tensors, clip = load(content), build_text_encoder(Text(kind="clip", path=str(narrow_clip), max_tokens=12))
    of_clip = clip(clip.tokenize([caption]))
    torch.testing.assert_close(tensors["second_pooled"], of_clip.pooled_BD[0], rtol=1e-4, atol=1e-5)
    assert ("second_text" in tensors) == (cross_text == "interleaved")
    if "second_text" in tensors:
        count = int(of_clip.mask_BL.sum())
        torch.testing.assert_close(tensors["second_text"], of_clip.features_BLD[0, :count], rtol=1e-4, atol=1e-5)
    with patch.object(PretrainedTextEncoder, "forward", side_effect=AssertionError("the text is stored")):
        assert losses(stored) == pytest.approx(expected, rel=5e-6)
    trained = open_trained(stored.directory, ["sample.guidance=3"])
    a, b = trained.draw(["a red cube", "two cats"], 0)
    assert not torch.equal(a, b)
    swapped = {"first": "interleaved", "interleaved": "first"}[cross_text]
    data = {"train": str(tmp_path / "out")}
    for other in (
        paired(build(tmp_path / "other", "t5", **data), folders["t5"], folders["clip"], cross_text),
        paired(build(tmp_path / "other", "t5", **data), folders["t5"], narrow_clip, cross_text, max_tokens=11),
        paired(build(tmp_path / "other", "t5", **data), folders["t5"], narrow_clip, swapped),
        build(tmp_path / "other", "t5", **data),
    ):
        with pytest.raises(ConfigError, match=r"text of t5 .* with the .*pooled caption of clip .* the run has t5"):
            run(other)


def test_cached_latents_with_prompts_and_two_encoders(
    build: Callable[..., RunConfig], folders: dict[str, Path], narrow_clip: Path, tmp_path: Path
) -> None:
    """Clips are encoded before the first step; the prompts of the samples are read by both encoders all the same."""
    config = paired(build(tmp_path / "run", "t5", cache_latents=True), folders["t5"], narrow_clip, "interleaved")
    sample = config.sample.model_copy(update={"prompts": ("a red cube", "two cats"), "num_steps": 1})
    assert run(config.model_copy(update={"sample": sample}))
    assert len(list((config.directory / "samples").rglob("*.mp4"))) == 2


def test_videos_beside_stored_text_of_two_encoders(
    build: Callable[..., RunConfig], folders: dict[str, Path], narrow_clip: Path, tiny_clips: Path, tmp_path: Path
) -> None:
    other, found = Path(shutil.copytree(tiny_clips, tmp_path / "other")), []

    def two(name: str, **data: Any) -> RunConfig:
        return paired(build(tmp_path / name, "t5", **data), folders["t5"], narrow_clip, "interleaved")

    encode_run(two("encode", train=str(other)), tmp_path / "latents", "fp32")
    for number, second in enumerate((other, tmp_path / "latents")):
        mixture = tuple({"path": str(path), "weight": 1} for path in (tiny_clips, second))
        found.append(losses(two(str(number), train="", mixture=mixture, num_validation=0)))
    assert found[1] == pytest.approx(found[0], rel=5e-6)
