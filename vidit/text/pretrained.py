"""Frozen text encoders from the transformers library: T5, UMT5, CLIP and LLaMA.

T5 (Raffel et al., arXiv 1910.10683; as a frozen encoder for diffusion: Saharia et al., "Imagen", arXiv
2205.11487), UMT5 (Chung et al., "UniMax", arXiv 2304.09151; the encoder of Wan), CLIP (Radford et al.,
arXiv 2103.00020) and LLaMA (Touvron et al., arXiv 2302.13971; what a language model takes beside the rest is in
`vidit/text/causal.py`) come from a local folder, or from the hub at one pinned commit.

What may be loaded is narrow: safetensors only, so nothing is unpickled; no remote code; and only a
`config.json` whose model type belongs to `text.kind`. What would load and be quietly wrong is refused:
transformers builds a T5 tokenizer of 104 pieces for a folder that has none, and fills missing weights with
random numbers. transformers is imported when an encoder is built, for it takes seconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vidit.text.causal import WHOLE, Template, keep_layers, read_template
from vidit.text.encoder import TextEncoder, TextFeatures, TextTokens, cut_captions, masked_mean, zero_padding

# kind -> (model types of config.json that hold it, class in transformers). A whole CLIP holds its text tower.
KINDS: dict[str, tuple[tuple[str, ...], str]] = {
    "t5": (("t5",), "T5EncoderModel"),
    "umt5": (("umt5",), "UMT5EncoderModel"),
    "clip": (("clip", "clip_text_model"), "CLIPTextModel"),
    "llama": (("llama",), "LlamaModel"),
}
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.json")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubTokenizer:
    """Captions in their template to ids (B, C + L) int64, padded on the right, and the mask (B, L) of what is kept."""

    tokenizer: Any
    max_tokens: int
    template: Template = WHOLE

    def __call__(self, captions: Sequence[str]) -> TextTokens:
        batch = self.tokenizer(
            [self.template.around(caption) for caption in cut_captions(captions, self.max_tokens)],
            padding="max_length",
            truncation=True,
            max_length=self.template.num_cut + self.max_tokens,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return TextTokens(batch["input_ids"], self.template.kept(batch["attention_mask"].bool()))


class PretrainedTextEncoder(TextEncoder):
    """A frozen T5, UMT5, CLIP text tower or LLaMA. `width` is the model's own.

    kind: "t5", "umt5", "clip" or "llama". path: a local folder or, with `revision` (a commit hash), a hub name.
    max_tokens: L; at most the number of positions of a CLIP or LLaMA, for this with the tokens that are cut off. dtype:
    of the weights and of the features. section: of the config, for messages. template, hidden_layer: of a LLaMA, as in
    the config.

    The weights come from files, so it is built outside `torch.device("meta")` (RuntimeError from
    transformers otherwise). Raises ValueError when `path` holds no model, another model, incomplete
    weights or no fitting tokenizer.
    """

    trainable = False

    def __init__(
        self,
        kind: str,
        path: str,
        *,
        revision: str | None = None,
        max_tokens: int,
        dtype: torch.dtype = torch.float32,
        section: str = "text",
        template: str = "",
        hidden_layer: int = -1,
    ):
        super().__init__()
        assert kind == "llama" or (not template and hidden_layer == -1), "of a language model alone"
        if kind not in KINDS:
            raise ValueError(f"{section}.kind={kind!r} is not a pretrained encoder; use one of {' '.join(KINDS)}")
        config = _read_config(kind, path, revision, section)
        tokenizer = _load_tokenizer(path, revision, section)
        self.kind, self.max_tokens = kind, max_tokens
        self.model = _load_model(kind, path, revision, dtype, section).requires_grad_(False).eval()
        if kind == "llama":
            keep_layers(self.model, hidden_layer, section)
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # few have one, and none is read
        self.dtype = dtype
        self.width: int = self.model.config.hidden_size  # T5 configs map it to d_model
        self.tokenizer = HubTokenizer(tokenizer, max_tokens, read_template(tokenizer, template, section))
        _check_fit(config["model_type"], path, self.model.config, tokenizer, self.tokenizer, section)

    def train(self, mode: bool = True) -> PretrainedTextEncoder:
        """Stays in eval mode: a frozen encoder has no business with its parent's dropout."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, tokens: TextTokens) -> TextFeatures:
        """ids (B, C + L) to the last hidden state (B, L, D); pooled is CLIP's end token, else the masked mean."""
        mask_BL = tokens.mask_BL
        cut = tokens.ids.shape[1] - mask_BL.shape[1]
        output = self.model(input_ids=tokens.ids, attention_mask=F.pad(mask_BL.long(), (cut, 0), value=1))
        features_BLD = zero_padding(output.last_hidden_state[:, cut:].to(self.dtype), mask_BL)
        if self.kind == "clip":
            return TextFeatures(features_BLD, mask_BL, output.pooler_output.to(self.dtype))
        return TextFeatures(features_BLD, mask_BL, masked_mean(features_BLD, mask_BL))


def _find_file(path: str, name: str, revision: str | None) -> Path | None:
    """A file of a local folder (no revision) or of the hub repository at `revision`; None if it has none."""
    if revision is None:
        file = Path(path) / name
        return file if file.is_file() else None
    from transformers.utils.hub import cached_file

    found = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _read_config(kind: str, path: str, revision: str | None, section: str) -> dict[str, Any]:
    """`config.json`, after checking where it comes from and that its model type belongs to `kind`."""
    if revision is None and not Path(path).is_dir():
        raise ValueError(
            f"{section}.path={path!r} is not a folder; for a hub name set {section}.revision to its commit hash"
        )
    if revision is not None and Path(path).is_dir():
        raise ValueError(f"{section}.revision={revision!r} has no effect on the local folder {path!r}; unset it")
    if revision is not None and not _COMMIT.fullmatch(revision):
        raise ValueError(f"{section}.revision={revision!r} can move; pin the 40-digit commit hash")
    file = _find_file(path, "config.json", revision)
    if file is None:
        raise ValueError(f"{section}.path={path!r} has no config.json; expected what save_pretrained writes")
    config = json.loads(file.read_text(encoding="utf-8"))
    found, expected = config.get("model_type"), KINDS[kind][0]
    if found not in expected:
        raise ValueError(
            f"{section}.path={path!r} holds model type {found!r}; {section}.kind={kind} expects {' or '.join(expected)}"
        )
    return dict(config)


def _load_tokenizer(path: str, revision: str | None, section: str) -> Any:
    """The tokenizer beside the weights, padding and cutting on the right."""
    if not any(_find_file(path, name, revision) for name in TOKENIZER_FILES):
        raise ValueError(
            f"{section}.path={path!r} has no tokenizer (none of {' '.join(TOKENIZER_FILES)}); "
            "copy the tokenizer's files beside config.json"
        )
    from transformers import AutoTokenizer

    # The side belongs to our mask and to T5's relative positions, not to what a file says.
    return AutoTokenizer.from_pretrained(
        path,
        revision=revision or "main",
        trust_remote_code=False,
        padding_side="right",
        truncation_side="right",
    )


def _load_model(kind: str, path: str, revision: str | None, dtype: torch.dtype, section: str) -> Any:
    """The encoder in `dtype` with every weight from the files."""
    import transformers

    if revision is None and not any(Path(path).glob("*.safetensors")):
        raise ValueError(f"{section}.path={path!r} has no *.safetensors; no other format is read")
    model_class = getattr(transformers, KINDS[kind][1])
    model, loading = model_class.from_pretrained(
        path,
        revision=revision or "main",
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    absent = sorted({*loading["missing_keys"], *map(str, loading["mismatched_keys"])})
    if absent:
        raise ValueError(
            f"{section}.path={path!r} lacks {len(absent)} weights of {KINDS[kind][1]}, among them {absent[0]}; "
            "the files are incomplete or belong to another model"
        )
    return model


def _check_fit(model_type: str, path: str, config: Any, tokenizer: Any, tokenize: HubTokenizer, section: str) -> None:
    """ValueError when tokenizer, model and `max_tokens` do not belong together."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{section}.path={path!r}: the tokenizer has {len(tokenizer)} entries and the model only "
            f"{config.vocab_size} rows; they belong to different models"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{section}.path={path!r}: the tokenizer has no padding token, batches cannot be padded")
    num_positions = getattr(config, "max_position_embeddings", None)
    cut = tokenize.template.num_cut
    if num_positions is not None and cut + tokenize.max_tokens > num_positions:
        front = f" with the {cut} tokens in front of the caption" if cut else ""
        raise ValueError(
            f"{section}.max_tokens={tokenize.max_tokens}{front} exceeds the {num_positions} positions of {path!r}"
        )
    empty = tokenize([""])
    seen = len(tokenizer(tokenize.template.around(""))["input_ids"])
    if cut and seen <= cut:
        raise ValueError(
            f"{section}.template leaves no token of the empty caption: all {cut} are cut off; end it in a token that "
            "stands behind {}, the one that ends a turn as a rule"
        )
    if not seen:
        raise ValueError(f"{section}.path={path!r}: the tokenizer gives '' no token; it must add an end token")
    # CLIP pools at its end token and takes the begin token, silently, where there is none. Old files say
    # end token 2 and pool at the largest id instead.
    is_clip = model_type in KINDS["clip"][0]
    if is_clip and config.eos_token_id != 2 and config.eos_token_id not in empty.ids[empty.mask_BL]:
        raise ValueError(
            f"{section}.path={path!r}: the tokenizer never gives the model's end token {config.eos_token_id}, "
            "where CLIP takes its pooled feature"
        )
