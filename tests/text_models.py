"""T5, UMT5 and CLIP as folders, for tests: real classes, random weights, tokenizers built here, no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

SENTENCES = [
    "a red cube slides left",
    "the blue ball bounces over a grey floor",
    "two cats look at the camera",
]


def unigram_tokenizer() -> Any:
    """A T5 tokenizer on a Unigram vocabulary trained on the sentences."""
    from transformers import T5Tokenizer

    special = ["<pad>", "</s>", "<unk>"]
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.train_from_iterator(
        SENTENCES, trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
    )
    vocabulary = [tuple(piece) for piece in json.loads(raw.to_str())["model"]["vocab"]]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


def word_tokenizer() -> Any:
    """A plain fast tokenizer (UMT5 has no class of its own): whole words, an end token, left padding."""
    import transformers

    raw = Tokenizer(models.WordLevel(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=["<pad>", "</s>", "<unk>"]))
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast: Any = transformers.PreTrainedTokenizerFast
    return fast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left")


def clip_tokenizer() -> Any:
    """A CLIP tokenizer whose byte-pair vocabulary is the letters, with one merge."""
    import transformers

    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{x}</w>" for x in letters), "re"]
    clip: Any = transformers.CLIPTokenizer
    return clip(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[("r", "e")])


def tiny_model(kind: str, width: int = 16) -> Any:
    import transformers

    torch.manual_seed(0)
    model: Any
    if kind == "clip":
        config = transformers.CLIPTextConfig(
            vocab_size=64, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=24, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )  # fmt: skip
        model = transformers.CLIPTextModel(config)
        return model.eval()
    sizes = {"vocab_size": 64, "d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    name = kind.upper()
    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, f"{name}EncoderModel")(config).eval()


def save_text_models(root: Path) -> dict[str, Path]:
    """One saved model with its tokenizer for each kind, below `root`."""
    makers = {"t5": unigram_tokenizer, "umt5": word_tokenizer, "clip": clip_tokenizer}
    for kind, make in makers.items():
        tiny_model(kind).save_pretrained(root / kind)
        make().save_pretrained(root / kind)
    return {kind: root / kind for kind in makers}
