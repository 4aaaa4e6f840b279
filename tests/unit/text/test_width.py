"""The width of text before an encoder is built: that of its files, and said to be unknown where there are none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.text_models import save_text_models, tiny_model
from vidit.batching import row_cost
from vidit.config import FAMILIES, RunConfig, SecondText, Text
from vidit.describe import describe
from vidit.model.dit import DiT
from vidit.text.encoder import build_text_encoder
from vidit.text.width import captions_of, stored_width
from vidit.vae.stored import adopt_vae

Configure = Callable[..., RunConfig]
SHAPE: dict[str, Any] = {
    **FAMILIES["gentron"], "num_layers": 2, "width": 48, "num_heads": 2, "mlp_width": 96, "pooled_width": 0,
    "text_embedding": "none", "patch": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_text_models(tmp_path_factory.mktemp("text"))


def pair(config: RunConfig, first: Path | str, second: Path | str, **more: Any) -> RunConfig:
    other = {"kind": "clip", "path": str(second), "max_tokens": 12}
    text = Text.model_validate({"kind": "t5", "path": str(first), "second": other, **more})
    return config.model_copy(update={"text": text})


@pytest.mark.parametrize("kind", ["t5", "umt5", "clip", "llama"])
def test_files_say_the_width_that_the_encoder_has(folders: dict[str, Path], kind: str) -> None:
    assert stored_width(kind, str(folders[kind]), None) == tiny_model(kind).config.hidden_size == 16


def test_a_whole_clip_holds_the_width_of_its_text_tower(tmp_path: Path) -> None:
    import transformers

    for width in (24, 512):  # the second is the class's default, which its file leaves out
        tower = {"hidden_size": width, "num_attention_heads": 2}
        transformers.CLIPConfig(text_config=tower).save_pretrained(tmp_path)
        assert stored_width("clip", str(tmp_path), None) == width
    older = {"model_type": "clip", "text_config": {"model_type": "clip_text_model"}}
    (tmp_path / "config.json").write_text(json.dumps(older | {"text_config_dict": {"hidden_size": 768}}))
    assert stored_width("clip", str(tmp_path), None) == 768


@pytest.mark.parametrize("content", ["[]", "{", '{"d_model": "64"}', '{"d_model": 0}'])
def test_a_damaged_file_says_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert stored_width("t5", str(tmp_path), None) is None


def test_parameters_are_those_of_the_model_that_is_built(
    configure: Configure, folders: dict[str, Path], tmp_path: Path
) -> None:
    tiny_model("clip", 24).save_pretrained(tmp_path / "clip")
    config = pair(configure(model=SHAPE), folders["t5"], tmp_path / "clip")
    found = describe(config, 1)["derived"]
    channels, grid = adopt_vae(config, 1).vae.latent_channels, tuple(found["largest_grid"])
    with torch.device("meta"):
        dit = DiT(config.model, channels, grid, 16, 24)
    assert found["dit_parameters"] == sum(math.prod(p.shape) for p in dit.parameters())
    assert "estimated" not in found
    assert captions_of(config) == (config.text.max_tokens, 16, (12, 24), ())
    text = build_text_encoder(config.text.model_copy(update={"second": SecondText()}))
    assert text.width == captions_of(config).width


def test_what_is_not_known_is_said(configure: Configure, folders: dict[str, Path]) -> None:
    hub = pair(configure(model=SHAPE), "google/t5", "none/clip", revision="0" * 40)
    said = describe(hub, 1)["derived"]["estimated"]
    assert said.startswith("the width of the text is unknown: text.path and text.second.path is no local folder")
    assert "for a width of 256 and 256" in said
    pooled = pair(configure(model={**SHAPE, "pooled_width": 24}), folders["t5"], "none/clip")
    assert captions_of(pooled) == (pooled.text.max_tokens, 16, (12, 24), ())
    known = pair(configure(model=SHAPE), folders["t5"], folders["clip"])
    # The order of clips follows from costs, and a folder that comes or goes may not change it.
    assert row_cost(known, known.data.shapes[0]) == row_cost(hub, hub.data.shapes[0])
    assert "estimated" not in describe(configure(), 1)["derived"]
