"""The byte encoder: hashes that every process agrees on, padding that leaks nowhere, gradients arrive."""

import base64
import os
import pickle
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vidit.text.bytes import BEGIN_ROW, MAX_NGRAMS, ByteTextEncoder, ByteTokenizer, split_words, word_ngrams
from vidit.text.encoder import TextEncoder, TextTokens, build_text_encoder

SETTINGS: dict[str, Any] = {
    "width": 32,
    "num_layers": 2,
    "num_heads": 4,
    "max_tokens": 16,
    "hash_buckets": 512,
}
CAPTIONS = ["a red cube slides left", "", "Zwei Würfel, 立方体 и куб 🐱👍🏽!", "word " * 50]


def section(**changes: object) -> Any:
    return SimpleNamespace(**{"kind": "bytes", "path": None, "revision": None, **SETTINGS, **changes})


@pytest.fixture
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return build_text_encoder(section())


def test_shapes_and_contract(encoder: TextEncoder) -> None:
    tokens = encoder.tokenize(CAPTIONS)
    assert tokens.ids.shape == (4, 16, MAX_NGRAMS)
    assert tokens.mask_BL.dtype == torch.bool
    assert tokens.mask_BL.sum(dim=1).tolist() == [6, 1, 13, 16]
    features = encoder(tokens.to("cpu"))
    assert features.features_BLD.shape == (4, 16, encoder.width)
    assert features.pooled_BD.shape == (4, encoder.width)
    assert features.features_BLD.dtype == torch.float32
    assert features.features_BLD[~tokens.mask_BL].abs().max() == 0
    assert features.features_BLD.isfinite().all()
    mean_BD = torch.stack([row[mask].mean(0) for row, mask in zip(features.features_BLD, tokens.mask_BL, strict=True)])
    torch.testing.assert_close(features.pooled_BD, mean_BD)
    assert encoder.trainable
    assert encoder.training


def test_empty_caption_is_the_begin_token(encoder: TextEncoder) -> None:
    tokens = encoder.tokenize(["", " \t\n"])
    assert tokens.mask_BL.sum(dim=1).tolist() == [1, 1]
    assert tokens.ids[:, 0, 0].tolist() == [BEGIN_ROW, BEGIN_ROW]
    features = encoder(tokens).features_BLD
    assert features[:, 0].abs().min(dim=1).values.max() > 0
    assert torch.equal(features[0], features[1])


def test_features_ignore_padding_and_neighbours() -> None:
    """More padding, other captions beside it and rubbish in the padding slots change nothing valid."""
    torch.manual_seed(0)
    short, long = ByteTextEncoder(**{**SETTINGS, "max_tokens": 8}), ByteTextEncoder(**SETTINGS)
    long.load_state_dict(short.state_dict())
    alone = short(short.tokenize(["a red cube"]))
    batch = long.tokenize(["a red cube", "a much longer caption with many more words than the first one has"])
    padded = long(batch)
    torch.testing.assert_close(padded.features_BLD[0, :4], alone.features_BLD[0, :4], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(padded.pooled_BD[0], alone.pooled_BD[0], rtol=1e-5, atol=1e-6)
    rubbish = torch.where(batch.mask_BL.unsqueeze(-1), batch.ids, 7)
    torch.testing.assert_close(long(TextTokens(rubbish, batch.mask_BL)).features_BLD, padded.features_BLD)


def test_word_order_and_every_word_matter(encoder: TextEncoder) -> None:
    pooled_BD = encoder(encoder.tokenize(["red cube blue ball", "blue cube red ball", "red cube blue bell"])).pooled_BD
    assert (pooled_BD[0] - pooled_BD[1]).abs().max() > 1e-4
    assert (pooled_BD[0] - pooled_BD[2]).abs().max() > 1e-4


def test_gradient_reaches_every_parameter_and_the_rows_used(encoder: Any) -> None:
    tokens = encoder.tokenize(CAPTIONS)
    features = encoder(tokens)
    (features.features_BLD.square() * torch.randn_like(features.features_BLD)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    touched = encoder.table.weight.grad.abs().amax(dim=1) > 0
    used = torch.zeros(SETTINGS["hash_buckets"], dtype=torch.bool)
    used[tokens.ids[tokens.mask_BL].unique().long()] = True
    used[0] = False  # the padding row
    assert torch.equal(touched, used)


def test_hashing_is_the_same_in_every_process(encoder: TextEncoder) -> None:
    """The rows are part of the weights: a process with another PYTHONHASHSEED must find the same ones."""
    code = (
        "import sys; from vidit.text.bytes import ByteTokenizer; import pickle, base64;"
        "captions = pickle.loads(base64.b64decode(sys.argv[1]));"
        "ids = ByteTokenizer(16, 512)(captions).ids; sys.stdout.write(ids.numpy().tobytes().hex())"
    )
    argument = base64.b64encode(pickle.dumps(CAPTIONS)).decode()
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "123",
        "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path),
    }
    found = subprocess.run(
        [sys.executable, "-c", code, argument], env=environment, capture_output=True, text=True, check=True
    )
    assert bytes.fromhex(found.stdout) == encoder.tokenize(CAPTIONS).ids.numpy().tobytes()


def test_hashing_is_pinned() -> None:
    """Changing the hash, the marks or the order of n-grams orphans every trained table: do it on purpose."""
    ids = ByteTokenizer(4, 8192)(["a cat"]).ids
    assert ids[0, 1, :4].tolist() == [5759, 4926, 6769, 4302]
    assert ids[0, 2, :4].tolist() == [760, 8112, 2471, 73]


def test_ngrams_of_a_word() -> None:
    grams = word_ngrams(b"cat")
    assert grams[0] == b"\x00\xfecat\xff"
    assert set(grams[1:]) == {
        *(b"\xfeca", b"cat", b"at\xff", b"\xfecat", b"cat\xff", b"\xfecat\xff"),
        *(b"\xfec", b"ca", b"at", b"t\xff", b"c", b"a", b"t"),
    }
    longest = word_ngrams(bytes(range(97, 113)))
    assert len(longest) == MAX_NGRAMS
    assert sum(len(gram) in (3, 4, 5) for gram in longest) == 45


def test_words() -> None:
    assert list(split_words("A dog's 3d-view, 1080p.")) == [
        "A",
        "dog",
        "'",
        "s",
        "3d",
        "-",
        "view",
        ",",
        "1080p",
        ".",
    ]
    assert list(split_words("立方体 が")) == ["立", "方", "体", "が"]
    assert list(split_words("हिन्दी भाषा")) == ["हिन्दी", "भाषा"]
    assert list(split_words("cat🐱🐶")) == ["cat", "🐱", "🐶"]
    assert list(split_words("x" * 40)) == ["x" * 16, "x" * 16, "x" * 8]


def test_case_folds_and_accents_compose() -> None:
    fold, keep = ByteTokenizer(4, 512), ByteTokenizer(4, 512, fold_case=False)
    assert torch.equal(fold(["Red CUBE"]).ids, fold(["red cube"]).ids)
    assert not torch.equal(keep(["Red CUBE"]).ids, keep(["red cube"]).ids)
    assert torch.equal(keep(["W\u00fcrfel"]).ids, keep(["Wu\u0308rfel"]).ids)


def test_odd_text_is_text(encoder: TextEncoder) -> None:
    captions = ["\x00\x01", "\ud800 lone surrogate", "👩‍👩‍👧‍👦", "\u200b", "<bos> </s> %s {}", "\U0010ffff"]
    features = encoder(encoder.tokenize(captions))
    assert features.features_BLD.isfinite().all()
    assert features.mask_BL[:, 0].all()


@pytest.mark.parametrize("text", ["x", " ", "ab ", "日本", "\u0301", "🐱"])
def test_ten_megabytes_are_cut_first(encoder: TextEncoder, text: str) -> None:
    caption = text * (10_000_000 // len(text))
    start = time.process_time()
    tokens = encoder.tokenize([caption])
    assert time.process_time() - start < 0.05
    assert tokens.ids.shape == (1, 16, MAX_NGRAMS)


def test_builds_on_meta_without_buffers() -> None:
    with torch.device("meta"):
        encoder = build_text_encoder(section())
    assert all(parameter.is_meta for parameter in encoder.parameters())
    assert not list(encoder.buffers())
    real = build_text_encoder(section())
    encoder.load_state_dict(real.state_dict(), assign=True)
    tokens = encoder.tokenize(CAPTIONS)
    assert torch.equal(encoder(tokens).features_BLD, real(tokens).features_BLD)


def test_tokenizer_travels_to_a_worker_without_the_weights(encoder: TextEncoder) -> None:
    payload = pickle.dumps(encoder.tokenizer)
    assert len(payload) < 1000
    assert torch.equal(pickle.loads(payload)(CAPTIONS).ids, encoder.tokenize(CAPTIONS).ids)


def test_layers_compute_in_the_dtype_asked_for() -> None:
    torch.manual_seed(0)
    encoder = ByteTextEncoder(**SETTINGS, dtype=torch.bfloat16)
    assert encoder.table.weight.dtype == torch.float32
    exact = ByteTextEncoder(**SETTINGS)
    exact.load_state_dict(encoder.state_dict())
    tokens = encoder.tokenize(CAPTIONS)
    rounded = encoder(tokens).features_BLD
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact(tokens).features_BLD, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "width=32 must be even and divisible by text.num_heads=5"),
        ({"max_tokens": 1}, "max_tokens=1"),
        ({"hash_buckets": 2}, "hash_buckets=2"),
        ({"path": "folder"}, "text.path='folder' has no effect"),
        ({"revision": "main"}, "text.revision='main' has no effect"),
    ],
)
def test_wrong_settings(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_text_encoder(section(**changes))


@pytest.mark.parametrize(("captions", "message"), [("a cat", "wrap it in a list"), ([], "0 captions")])
def test_wrong_batches(encoder: TextEncoder, captions: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder.tokenize(captions)
