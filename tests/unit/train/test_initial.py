"""`train.init_from`: a run begins with another's weights, whole parts of it or none, and says what does not fit."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vidit.config import FAMILIES, Model, RunConfig
from vidit.export.weights import export_weights
from vidit.model.dit import DiT
from vidit.model.init import initial_value
from vidit.text.encoder import build_text_encoder
from vidit.train.initial import initial_values, new_parts
from vidit.train.parallelize import build_dit
from vidit.train.run import run
from vidit.vae.stored import adopt_vae


@pytest.fixture(scope="module")
def weights(configure: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of two steps has become."""
    folder = tmp_path_factory.mktemp("weights")
    assert run(configure(folder / "run", train={"steps": 2, "learning_rate": 1e-2}, sample={"prompts": ()}))
    export_weights(folder / "run", folder / "out", "model")
    return folder / "out"


def built(config: RunConfig) -> dict[str, torch.Tensor]:
    config = adopt_vae(config, 1)
    text = build_text_encoder(config.text, torch.float32)
    return dict(build_dit(config, text, torch.device("cpu"), torch.float32).state_dict())


@pytest.fixture
def start(configure: Callable[..., RunConfig], tmp_path: Path) -> Callable[[Path], RunConfig]:
    def start(folder: Path) -> RunConfig:
        return configure(tmp_path / "new", train={"steps": 1, "init_from": str(folder)}, sample={"prompts": ()})

    return start


def test_every_tensor_is_the_folders(start: Any, weights: Path) -> None:
    found, wanted = built(start(weights)), load_file(weights / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert {name.partition(".")[0] for name in found} == {"dit", "text"}
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


def test_a_part_that_the_folder_lacks_begins_afresh(start: Any, weights: Path, tmp_path: Path) -> None:
    wanted = {n: t for n, t in load_file(weights / "model.safetensors").items() if n.startswith("dit.")}
    (tmp_path / "dit").mkdir()
    save_file(wanted, tmp_path / "dit" / "model.safetensors")
    config = start(tmp_path / "dit")
    found = built(config)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    new = [name for name in found if name.startswith("text.")]
    assert new
    assert all(torch.equal(found[n], initial_value(n, tuple(found[n].shape), config.train.seed)) for n in new)


def test_what_does_not_fit_is_named(start: Any, weights: Path, tmp_path: Path) -> None:
    tensors = load_file(weights / "model.safetensors")
    path = tmp_path / "odd" / "model.safetensors"
    path.parent.mkdir()
    tensors["dit.head.colour"] = tensors.pop("dit.head.project.bias")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"1 missing: dit\.head\.project\.bias; 1 unknown: dit\.head\.colour"):
        built(start(path.parent))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cannot be read as weights.*copy it again"):
        built(start(path.parent))
    path.unlink()
    with pytest.raises(ValueError, match=r"holds no \.safetensors file"):
        built(start(path.parent))


def test_a_run_with_a_checkpoint_reads_no_folder(
    configure: Callable[..., RunConfig], weights: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(weights, tmp_path / "weights"))
    given = {"init_from": str(folder), "checkpoint_every": 1}
    assert run(configure(tmp_path / "run", train={"steps": 1, **given}, sample={"prompts": ()}))
    shutil.rmtree(folder)
    assert run(configure(tmp_path / "run", train={"steps": 2, **given}, sample={"prompts": ()}))
    with pytest.raises(ValueError, match=r"holds no \.safetensors file"):
        run(configure(tmp_path / "other", train={"steps": 2, **given}, sample={"prompts": ()}))


def test_a_model_of_images_begins_one_of_videos(configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Weights without attention through time fit a model with it: what is new is named, and adds nothing yet."""
    plain = {**FAMILIES["gentron"], "num_layers": 2, "width": 32, "num_heads": 2, "mlp_width": 48, "patch": 1}
    images = {**plain, "temporal_attention": False, "relative_position": "none", "rope_split": "quarter"}
    quiet: dict[str, Any] = {"sample": {"prompts": ()}, "diffusion": {}}
    assert run(configure(tmp_path / "images", model=images, train={"steps": 2, "learning_rate": 1e-2}, **quiet))
    export_weights(tmp_path / "images", tmp_path / "weights", "model")
    begin = {"steps": 1, "init_from": str(tmp_path / "weights")}
    videos = configure(tmp_path / "videos", model=plain, train=begin, **quiet)
    found, wanted = built(videos), load_file(tmp_path / "weights" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    new = {name for name in found if name not in wanted}
    assert {name.split(".")[3] for name in new} == {"temporal"}
    assert not any(found[name].any() for name in new if ".out." in name)
    (note,) = new_parts(videos, found)
    assert "no attention through time: new is dit.*.temporal*, which begins by adding zero" in note
    assert new == {name for name in found if fnmatch(name, "dit.*.temporal*")}
    assert new_parts(configure(tmp_path / "other", model=images, train=begin, **quiet), wanted) == []
    assert run(videos)
    assert new_parts(videos, found) == [], "it has a checkpoint of its own"


def test_text_is_new_to_a_model_without(configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    """What is said to be new are patterns of exactly the new names, as train.trainable takes them."""
    deaf = {**FAMILIES["gentron"], "num_layers": 2, "width": 32, "num_heads": 2, "mlp_width": 48, "patch": 1,
            "cross_attention": "none", "pooled_text": False, "text_embedding": "mlp"}  # fmt: skip
    quiet: dict[str, Any] = {"sample": {"prompts": (), "guidance": 1.0}, "diffusion": {}}
    names = {f"dit.{name}" for name, _ in DiT(Model(**deaf), 4, (2, 2, 2), 8).named_parameters()}
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    hearing = {**deaf, "cross_attention": "all", "pooled_text": True}
    config = configure(tmp_path / "run", model=hearing, train={"init_from": str(tmp_path)}, **quiet)
    found = {f"dit.{name}" for name, _ in DiT(Model(**hearing), 4, (2, 2, 2), 8).named_parameters()}
    patterns = [re.search(r"new is (\S+),", note)[1] for note in new_parts(config, found)]  # type: ignore[index]
    assert patterns == ["dit.*.cross*", "dit.embed.text.*", "dit.*.conditioning.pooled.*"]
    assert {name for name in found if any(fnmatch(name, pattern) for pattern in patterns)} == found - names


def test_a_model_of_videos_fits_whole_or_not_at_all(configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    model = {**FAMILIES["gentron"], "num_layers": 1, "width": 32, "num_heads": 2, "mlp_width": 48, "patch": 1}
    quiet: dict[str, Any] = {"model": model, "sample": {"prompts": ()}, "diffusion": {}}
    begin = {"steps": 1, "init_from": str(tmp_path)}
    tensors = built(configure(tmp_path / "run", **quiet))
    lost = tensors.pop("dit.blocks.0.temporal.out.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing: dit\.blocks\.0\.temporal\.out\.bias"):
        built(configure(tmp_path / "run", train=begin, **quiet))
    save_file(tensors | {"dit.blocks.0.temporal.out.bias": lost + 1}, tmp_path / "model.safetensors")
    found = built(configure(tmp_path / "run", train=begin, **quiet))
    assert torch.equal(found["dit.blocks.0.temporal.out.bias"], lost + 1)


def test_text_that_is_new_to_a_unet_is_missing(configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Its attention to text would not begin by adding zero."""
    save_file({"unet.first.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    config = configure(tmp_path / "run", train={"init_from": str(tmp_path)})
    names = ["unet.first.weight", "unet.middle.cells.0.attention.cross.out.weight"]
    with pytest.raises(ValueError, match=r"1 missing: unet\.middle\.cells\.0\.attention\.cross\.out\.weight"):
        initial_values(config, names)
    initial_values(config, [names[0], "unet.middle.temporal_attention.out.weight"])


def test_a_second_text_for_attention_that_is_there_is_missing(
    configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Blocks that have learned to read the first one would read it."""
    names = ["dit.blocks.0.cross.out.weight", "dit.embed.text.out.weight"]
    save_file({name: torch.ones(1) for name in names}, tmp_path / "model.safetensors")
    config = configure(tmp_path / "run", train={"init_from": str(tmp_path)})
    with pytest.raises(ValueError, match=r"1 missing: dit\.embed\.second_text\.out\.weight"):
        initial_values(config, [*names, "dit.embed.second_text.out.weight"])
