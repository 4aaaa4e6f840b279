"""T5, UMT5, CLIP and LLaMA as folders, for tests: real classes, random weights, tokenizers built here, no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

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


def llama_tokenizer() -> Any:
    """Bytes joined in pairs, as of LLaMA 3: a begin token and no end, marks of turns, line breaks of their own."""
    import transformers

    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s*[\r\n]+| ?\w+|[^\s\w]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer  # its stub has no arguments
    letters = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        [*SENTENCES, "{}\n\n"] * 2,
        trainer(vocab_size=300, special_tokens=special, initial_alphabet=letters, show_progress=False),
    )
    raw.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], 0)])
    fast: Any = transformers.PreTrainedTokenizerFast
    return fast(tokenizer_object=raw, bos_token=special[0], eos_token=special[1], padding_side="right")


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
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=320, hidden_size=width, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=1024, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        return transformers.LlamaModel(config).eval()
    sizes = {"vocab_size": 64, "d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    name = kind.upper()
    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, f"{name}EncoderModel")(config).eval()


def save_text_models(root: Path) -> dict[str, Path]:
    """One saved model with its tokenizer for each kind, below `root`."""
    makers = {"t5": unigram_tokenizer, "umt5": word_tokenizer, "clip": clip_tokenizer, "llama": llama_tokenizer}
    for kind, make in makers.items():
        tiny_model(kind).save_pretrained(root / kind)
        make().save_pretrained(root / kind)
    return {kind: root / kind for kind in makers}
