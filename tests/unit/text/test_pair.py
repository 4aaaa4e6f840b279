"""Two frozen encoders behind one interface: real classes, random weights, no network."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.text_models import save_text_models
from vidit.config import Text
from vidit.text.encoder import TextEncoder, build_text_encoder
from vidit.text.pair import PairTextEncoder

CAPTIONS = ["a red cube", "", "the blue ball bounces over two cats at the camera " * 4]
LENGTHS = 16, 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_text_models(tmp_path_factory.mktemp("text"))


def section(folders: dict[str, Path], **second: Any) -> Text:
    pair = {"kind": "clip", "path": str(folders["clip"]), "max_tokens": LENGTHS[1], **second}
    return Text(kind="t5", path=str(folders["t5"]), max_tokens=LENGTHS[0], second=pair)


def alone(kind: str, folders: dict[str, Path], max_tokens: int) -> TextEncoder:
    return build_text_encoder(Text(kind=kind, path=str(folders[kind]), max_tokens=max_tokens))


@pytest.mark.parametrize("tokens_too", [False, True])
def test_features_of_one_and_the_pooled_caption_of_the_other(folders: dict[str, Path], tokens_too: bool) -> None:
    pair = build_text_encoder(section(folders), second_tokens=tokens_too)
    t5, clip = alone("t5", folders, LENGTHS[0]), alone("clip", folders, LENGTHS[1])
    assert (pair.width, pair.max_tokens, pair.second_captions) == (t5.width, LENGTHS[0], (LENGTHS[1], clip.width))
    assert pair.pooled_width == clip.width
    found, one, other = pair(pair.tokenize(CAPTIONS)), t5(t5.tokenize(CAPTIONS)), clip(clip.tokenize(CAPTIONS))
    assert torch.equal(found.features_BLD, one.features_BLD)
    assert torch.equal(found.mask_BL, one.mask_BL)
    assert torch.equal(found.pooled_BD, other.pooled_BD)
    assert not torch.allclose(found.pooled_BD, one.pooled_BD)
    assert (found.second is not None) == tokens_too
    if found.second is not None:
        assert torch.equal(found.second.features_BLD, other.features_BLD)
        assert torch.equal(found.second.mask_BL, other.mask_BL)


def test_tokens_of_some_captions_and_in_a_worker(folders: dict[str, Path]) -> None:
    pair = build_text_encoder(section(folders), second_tokens=True)
    tokens = pickle.loads(pickle.dumps(pair.tokenizer))(CAPTIONS)
    assert tokens.second is not None
    assert tokens.second.mask_BL.shape == (3, LENGTHS[1])
    whole, some = pair(tokens), pair(tokens.to("cpu").rows([2, 0]))
    torch.testing.assert_close(some.pooled_BD, whole.pooled_BD[[2, 0]])
    torch.testing.assert_close(some.second.features_BLD, whole.second.features_BLD[[2, 0]])


def test_frozen_in_the_dtype_that_is_asked_for(folders: dict[str, Path]) -> None:
    pair = build_text_encoder(section(folders), torch.bfloat16, second_tokens=True)
    assert isinstance(pair, PairTextEncoder)
    assert not pair.trainable
    assert not any(p.requires_grad for p in pair.parameters())
    assert not any(module.training for module in torch.nn.Sequential(pair).train()[0].modules() if module is not pair)
    found = pair(pair.tokenize(CAPTIONS))
    assert found.second is not None
    assert {x.dtype for x in (found.features_BLD, found.pooled_BD, found.second.features_BLD)} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ({"path": "absent"}, r"text\.second\.path='absent' is not a folder; .* set text\.second\.revision"),
        ({"kind": "umt5"}, r"text\.second\.kind=umt5 expects umt5"),
        ({"max_tokens": 25}, r"text\.second\.max_tokens=25 exceeds the 24 positions"),
    ],
)
def test_faults_name_the_second(folders: dict[str, Path], second: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build_text_encoder(section(folders, **second))


def test_a_second_without_its_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    bare = Path(shutil.copytree(folders["clip"], tmp_path / "clip"))
    for name in ("tokenizer.json", "vocab.json"):
        (bare / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"text\.second\.path=.* has no tokenizer"):
        build_text_encoder(section(folders, path=str(bare)))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ({"second": {"kind": "clip"}, "kind": "t5", "path": "a"}, "text.second.kind=clip needs text.second.path"),
        ({"second": {"kind": "clip", "path": "a"}}, "set text.kind=t5, umt5, clip or llama, or leave text.second out"),
        ({"second": {"kind": "t5", "path": "a"}, "kind": "t5", "path": "a"}, "is the encoder of text once more"),
    ],
)
def test_sections_that_contradict_themselves(text: dict[str, Any], told: str) -> None:
    (fault,) = Text.model_validate(text).faults()
    assert told in fault
