"""A language model as text encoder, compared with the pipeline of HunyuanVideo: its own code, template and cut.

Real classes, random weights, a tokenizer built here, no network.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.text_models import llama_tokenizer, tiny_model
from vidit.config import Text
from vidit.text.causal import Template, read_template
from vidit.text.encoder import TextEncoder, build_text_encoder
from vidit.text.pretrained import HubTokenizer

CAPTIONS = [
    "a red cube slides left", "", "two cats look at the camera " * 8,
    "\n\na blue ball, {braces} and <|eot_id|>", " ", "\n",
]  # fmt: skip
LENGTH = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never written to by a test."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(folder)
    llama_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> TextEncoder:
    return build_text_encoder(Text(kind="llama", path=str(folder), **{"max_tokens": LENGTH, **options}), dtype)


def theirs(folder: Path, template: dict[str, Any], captions: list[str], skipped: int = 2) -> tuple[Tensor, Tensor]:
    from diffusers import HunyuanVideoPipeline

    names = ("transformer", "vae", "scheduler", "text_encoder_2", "tokenizer_2")
    pipeline: Any = HunyuanVideoPipeline(
        text_encoder=tiny_model("llama"), tokenizer=padded(folder), **dict.fromkeys(names)
    )
    with torch.no_grad():
        features, mask = pipeline._get_llama_prompt_embeds(
            captions, template, max_sequence_length=LENGTH, num_hidden_layers_to_skip=skipped
        )
    return features, mask.bool()


def padded(folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.mark.parametrize("hidden_layer", [-1, -3, -4])
def test_equals_the_pipeline(folder: Path, hidden_layer: int) -> None:
    """Its own template, and its own count of what is cut, which it makes where no number is given."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    template = DEFAULT_PROMPT_TEMPLATE["template"]
    encoder = load(folder, template=template, hidden_layer=hidden_layer)
    tokens = encoder.tokenize(CAPTIONS)
    assert len(tokens.ids[0]) - LENGTH > 95, "letters of a small vocabulary"
    found = encoder(tokens)
    features, mask = theirs(folder, {"template": template}, CAPTIONS, -1 - hidden_layer)
    assert features.shape == found.features_BLD.shape == (len(CAPTIONS), LENGTH, encoder.width)
    assert torch.equal(found.mask_BL, mask)
    assert mask.sum(dim=1)[1:3].tolist() == [1, LENGTH], "the empty caption is the end of its turn, the long is cut"
    torch.testing.assert_close(found.features_BLD[mask], features[mask], rtol=0, atol=1e-5)
    assert not found.features_BLD[~mask].any()
    for row, kept in enumerate(mask):
        torch.testing.assert_close(found.pooled_BD[row], features[row, kept].mean(dim=0), rtol=0, atol=1e-5)


def test_the_caption_alone_keeps_its_begin_token(folder: Path) -> None:
    encoder, model = load(folder, hidden_layer=-2), tiny_model("llama")
    tokens = encoder.tokenize(CAPTIONS[:2])
    assert tokens.ids.shape == tokens.mask_BL.shape
    assert (tokens.ids[:, 0] == 0).all()
    with torch.no_grad():
        hidden = model(tokens.ids, attention_mask=tokens.mask_BL.long(), output_hidden_states=True).hidden_states[-2]
    mask_BL = tokens.mask_BL
    torch.testing.assert_close(encoder(tokens).features_BLD[mask_BL], hidden[mask_BL], rtol=0, atol=1e-5)


def test_a_template_that_begins_with_the_caption(folder: Path) -> None:
    """Its begin token is in front of the caption and is cut, as the pipeline counts."""
    encoder = load(folder, template="{}<|eot_id|>", hidden_layer=-3)
    features, mask = theirs(folder, {"template": "{}<|eot_id|>"}, CAPTIONS)
    found = encoder(encoder.tokenize(CAPTIONS))
    assert torch.equal(found.mask_BL, mask)
    torch.testing.assert_close(found.features_BLD[mask], features[mask], rtol=0, atol=1e-5)


def test_padding_neighbours_and_workers_change_nothing(folder: Path) -> None:
    encoder = load(folder, template="say:\n{}<|eot_id|>", hidden_layer=-3)
    whole = encoder(pickle.loads(pickle.dumps(encoder.tokenizer))(CAPTIONS))
    for row, caption in enumerate(CAPTIONS):
        alone = encoder(encoder.tokenize([caption]))
        torch.testing.assert_close(alone.features_BLD[0], whole.features_BLD[row], rtol=1e-4, atol=1e-5)
    some = encoder(encoder.tokenize(CAPTIONS).rows([2, 0]))
    torch.testing.assert_close(some.pooled_BD, whole.pooled_BD[[2, 0]], rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # what pads is not read
        encoder.model.embed_tokens.weight[1] = 1e3
    torch.testing.assert_close(encoder(encoder.tokenize(CAPTIONS)).pooled_BD, whole.pooled_BD)


def test_layers_above_are_not_held(folder: Path) -> None:
    first, last = load(folder, torch.bfloat16, hidden_layer=-4), load(folder, torch.bfloat16)
    assert {p.dtype for p in first.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in first.parameters()) < sum(p.numel() for p in last.parameters())
    with pytest.raises(
        ValueError, match=r"hidden_layer=-5 lies before the first of the model's 4 layers; use -1 to -4"
    ):
        load(folder, hidden_layer=-5)


@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_bytes_stay_bytes_whatever_class_a_file_names(folder: Path, tmp_path: Path, named: str) -> None:
    """LLaMA 3's files name the class of LLaMA 2's tokenizer, which cuts words otherwise."""
    moved = Path(shutil.copytree(folder, tmp_path / "llama"))
    config = moved / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tokenizer_class": named}))
    assert torch.equal(load(moved).tokenize(CAPTIONS).ids, load(folder).tokenize(CAPTIONS).ids)


@pytest.mark.parametrize("template", ["say: {}", "a re{}", "say: {} please"])
def test_a_head_that_melts_into_the_caption_is_refused(folder: Path, template: str) -> None:
    with pytest.raises(ValueError, match=r"text\.template: the tokenizer joins the end of .* cannot be cut off"):
        load(folder, template=template)


def test_a_template_must_leave_a_token(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"leaves no token of the empty caption"):
        load(folder, template="say:\n{}")


def test_positions_count_what_is_cut(folder: Path) -> None:
    load(folder, template="say:\n{}<|eot_id|>", max_tokens=1000)
    with pytest.raises(ValueError, match=r"max_tokens=1020 with the \d+ tokens in front .* exceeds the 1024 positions"):
        load(folder, template="say:\n{}<|eot_id|>", max_tokens=1020)


def test_a_caption_that_melts_into_the_head_keeps_a_token(folder: Path) -> None:
    """Where the head is counted with more tokens than it has before this caption."""
    tokens = HubTokenizer(padded(folder), 4, Template("\n\n", "", 4))(["", "a"])
    assert tokens.mask_BL.tolist() == [[True, False, False, False]] * 2


def test_an_end_token_behind_is_not_counted(folder: Path) -> None:
    from tokenizers import processors

    tokenizer = padded(folder)
    before = read_template(tokenizer, "say:\n{}<|eot_id|>", "text")
    both = processors.TemplateProcessing(
        single="<|begin_of_text|> $A <|end_of_text|>", special_tokens=[("<|begin_of_text|>", 0), ("<|end_of_text|>", 1)]
    )
    tokenizer.backend_tokenizer.post_processor = both
    assert read_template(tokenizer, "say:\n{}<|eot_id|>", "text") == before


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("describe it", r"holds {} 0 times; write it once"),
        ("{} and {}", r"holds {} 2 times; write it once"),
        ("{}", "has no effect: it is the caption alone"),
    ],
)
def test_templates_that_are_none(template: str, told: str) -> None:
    (fault,) = Text(kind="llama", path="a", template=template).faults()
    assert told in fault
