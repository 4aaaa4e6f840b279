"""T5, UMT5, CLIP and LLaMA as frozen encoders: real classes, random weights, tokenizers built here, no network."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tokenizers import processors

from tests.text_models import clip_tokenizer, save_text_models, tiny_model, word_tokenizer
from vidit.text.encoder import TextEncoder, build_text_encoder

CAPTIONS = ["a red cube", "", "the blue ball bounces over two cats at the camera " * 4]
KINDS = ["t5", "umt5", "clip", "llama"]
LENGTH = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One saved model with its tokenizer for each kind. Never written to by a test."""
    return save_text_models(tmp_path_factory.mktemp("text"))


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the T5 folder that a test may damage."""
    return Path(shutil.copytree(folders["t5"], tmp_path / "t5"))


def load(kind: str, path: Path | str, dtype: torch.dtype = torch.float32, **changes: object) -> TextEncoder:
    fields = {
        "kind": kind, "path": str(path), "revision": None, "max_tokens": LENGTH, "width": 99, "has_second": False,
        "template": "", "hidden_layer": -1,
    }  # fmt: skip
    return build_text_encoder(cast(Any, SimpleNamespace(**{**fields, **changes})), dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_transformers_model(kind: str, folders: dict[str, Path]) -> None:
    """One caption, its valid ids only, through the model as it was before it was saved."""
    encoder, model = load(kind, folders[kind]), tiny_model(kind)
    tokens = encoder.tokenize(CAPTIONS)
    assert tokens.ids.shape == tokens.mask_BL.shape == (3, LENGTH)
    features = encoder(tokens)
    assert features.features_BLD.shape == (3, LENGTH, 16)
    assert encoder.width == 16
    for row, mask in enumerate(tokens.mask_BL):
        count = int(mask.sum())
        assert mask[:count].all(), "padding stands on the right"
        with torch.no_grad():
            output = model(input_ids=tokens.ids[row : row + 1, :count])
        hidden_LD = output.last_hidden_state[0]
        pooled_D = output.pooler_output[0] if kind == "clip" else hidden_LD.mean(dim=0)
        torch.testing.assert_close(features.features_BLD[row, :count], hidden_LD, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features.pooled_BD[row], pooled_D, rtol=1e-4, atol=1e-5)
        assert (features.features_BLD[row, count:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_captions_become_words_and_are_cut(kind: str, folders: dict[str, Path]) -> None:
    encoder: Any = load(kind, folders[kind])
    tokens = encoder.tokenize(CAPTIONS)
    text = encoder.tokenizer.tokenizer.decode(tokens.ids[0][tokens.mask_BL[0]], skip_special_tokens=True)
    assert text.strip() == CAPTIONS[0]
    assert tokens.mask_BL[2].all()
    end = 1
    assert (tokens.ids[2, -1] == end) == (kind != "llama"), "a cut caption keeps its end token, where there is one"


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_neighbours_change_nothing(kind: str, folders: dict[str, Path]) -> None:
    short, long = load(kind, folders[kind]), load(kind, folders[kind], max_tokens=24)
    alone, batch = short(short.tokenize(CAPTIONS[:1])), long(long.tokenize(CAPTIONS))
    count = int(alone.mask_BL.sum())
    assert batch.mask_BL[0].sum() == count
    torch.testing.assert_close(batch.features_BLD[0, :count], alone.features_BLD[0, :count], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch.pooled_BD[0], alone.pooled_BD[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_caption_has_a_token(kind: str, folders: dict[str, Path]) -> None:
    encoder = load(kind, folders[kind])
    features = encoder(encoder.tokenize(["", ""]))
    assert features.mask_BL.sum(dim=1).tolist() == ([2, 2] if kind == "clip" else [1, 1])
    assert features.pooled_BD.abs().max() > 0
    assert torch.equal(features.features_BLD[0], features.features_BLD[1])


@pytest.mark.parametrize("kind", KINDS)
def test_frozen(kind: str, folders: dict[str, Path]) -> None:
    encoder = load(kind, folders[kind])
    assert not encoder.trainable
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(module.training for module in torch.nn.Sequential(encoder).train()[0].modules())
    assert not encoder(encoder.tokenize(CAPTIONS)).features_BLD.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_dtype(kind: str, folders: dict[str, Path]) -> None:
    encoder, exact = load(kind, folders[kind], torch.bfloat16), load(kind, folders[kind])
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    features, expected = (e(e.tokenize(CAPTIONS)) for e in (encoder, exact))
    assert features.features_BLD.dtype == features.pooled_BD.dtype == torch.bfloat16
    torch.testing.assert_close(features.pooled_BD.float(), expected.pooled_BD, rtol=0.1, atol=0.1)


def test_a_whole_clip_gives_its_text_tower(folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    text = tiny_model("clip")
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    whole = CLIPModel(CLIPConfig(text_config=text.config.to_dict(), vision_config=vision))
    whole.text_model.load_state_dict(text.state_dict())
    whole.save_pretrained(tmp_path)
    clip_tokenizer().save_pretrained(tmp_path)
    found, expected = load("clip", tmp_path), load("clip", folders["clip"])
    tokens = expected.tokenize(CAPTIONS)
    assert torch.equal(found(tokens).features_BLD, expected(tokens).features_BLD)


def test_a_hostile_caption_is_cut_first(folders: dict[str, Path]) -> None:
    encoder = load("t5", folders["t5"])
    tokens = encoder.tokenize(["a red cube " * 1_000_000])
    assert tokens.mask_BL.all()
    assert torch.equal(tokens.ids, encoder.tokenize(["a red cube " * 50]).ids)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a folder; for a hub name set text.revision"):
        load("t5", tmp_path / "absent")


def test_no_path() -> None:
    with pytest.raises(ValueError, match=r"text.kind=t5 needs text.path"):
        build_text_encoder(cast(Any, SimpleNamespace(kind="t5", path=None, revision=None, max_tokens=8)))


def test_hub_name_needs_a_pinned_commit() -> None:
    with pytest.raises(ValueError, match=r"text.revision='main' can move"):
        load("t5", "google/t5-v1_1-xxl", revision="main")


def test_revision_of_a_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match="no effect on the local folder"):
        load("t5", folder, revision="0" * 40)


@pytest.mark.parametrize(("kind", "expected"), [("umt5", "umt5"), ("clip", "clip or clip_text_model")])
def test_another_model_type(folder: Path, kind: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"holds model type 't5'; text.kind={kind} expects {expected}"):
        load(kind, folder)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        load("t5", tmp_path)


def test_no_tokenizer(folder: Path) -> None:
    """transformers would build a T5 tokenizer of sentinels and map every caption to unknown."""
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer"):
        load("t5", folder)


def test_no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model("t5").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        load("t5", folder)


def test_missing_weights(folder: Path) -> None:
    """transformers would fill them with random numbers and warn."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    lost = "encoder.block.1.layer.0.SelfAttention.q.weight"
    del weights[lost]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 weights of T5EncoderModel, among them {lost}"):
        load("t5", folder)


def test_tokenizer_of_a_larger_model(folder: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(64)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="they belong to different models"):
        load("t5", folder)


def test_tokenizer_without_an_end_token(folder: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(ValueError, match="gives '' no token"):
        load("t5", folder)


def test_clip_has_few_positions(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="max_tokens=25 exceeds the 24 positions"):
        load("clip", folders["clip"], max_tokens=25)


def test_clip_end_token_must_be_the_models(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["clip"], tmp_path / "clip"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 60}))
    with pytest.raises(ValueError, match="never gives the model's end token 60"):
        load("clip", folder)
