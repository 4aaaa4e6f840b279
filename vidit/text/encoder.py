"""The one interface between captions and the denoiser.

A caption becomes features in two steps, so that the first can run in a data worker:

    captions --tokenizer (CPU, picklable, no parameters)--> TextTokens --encoder.forward--> TextFeatures

The contract of every encoder:
- shapes are static: L is always `max_tokens`, so a compiled step sees one shape;
- `mask_BL` is True at valid tokens; features are exactly zero elsewhere, and what stands at padding or in
  the other captions of a batch never changes the features at valid tokens;
- the empty caption is legal and holds at least one valid token: it is the unconditional branch of
  classifier-free guidance (Ho and Salimans, "Classifier-Free Diffusion Guidance", arXiv 2207.12598);
- a caption longer than L tokens is cut, and only its first `CHARS_PER_TOKEN * max_tokens` characters are
  read, so a hostile caption costs no more than a long one.

Two encoders at once (`vidit/text/pair.py`) are one more encoder: what the second gives hangs on what the first gives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from vidit.dtypes import widen

if TYPE_CHECKING:
    from vidit.config import Text

# English runs at 4 to 5 characters a token; only runs of blanks or rubbish reach an average of 64.
CHARS_PER_TOKEN = 64


@dataclass(frozen=True)
class TextTokens:
    """Tokenised captions.

    ids: integers that only their own encoder understands, (B, L) or (B, L, n-grams); 0 fills the padding
        of the byte encoder, the tokenizer's own padding id that of a pretrained one. With a template (B, C + L):
        its C tokens in front of the caption are read, and have no features.
    mask_BL: bool, True at valid tokens; at least one a row.
    second: the same captions as a second encoder takes them; its L is its own.
    """

    ids: Tensor
    mask_BL: Tensor
    second: TextTokens | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TextTokens:
        """The same tokens on `device`."""
        second = None if self.second is None else self.second.to(device, non_blocking)
        return TextTokens(
            self.ids.to(device, non_blocking=non_blocking), self.mask_BL.to(device, non_blocking=non_blocking), second
        )

    def rows(self, chosen: Sequence[int]) -> TextTokens:
        """Of these captions alone."""
        own, second = list(chosen), None if self.second is None else self.second.rows(chosen)
        return TextTokens(self.ids[own], self.mask_BL[own], second)


@dataclass(frozen=True)
class TextFeatures:
    """What the denoiser reads.

    features_BLD: float, D = `encoder.width`; zero at padding.
    mask_BL: bool, True at valid tokens.
    pooled_BD: float, one vector a caption (for adaptive layer norm); of the second encoder, where there are two.
    second: what a second encoder gives for the same captions, where its tokens are asked for.
    """

    features_BLD: Tensor
    mask_BL: Tensor
    pooled_BD: Tensor
    second: TextFeatures | None = None

    def to(self, device: torch.device | str, dtype: torch.dtype) -> TextFeatures:
        """The same on `device`, features in `dtype`."""
        return TextFeatures(
            self.features_BLD.to(device, dtype),
            self.mask_BL.to(device),
            self.pooled_BD.to(device, dtype),
            None if self.second is None else self.second.to(device, dtype),
        )


class CaptionTokenizer(Protocol):
    """Captions to tokens on the CPU. Picklable: a data worker gets this and not the encoder."""

    def __call__(self, captions: Sequence[str]) -> TextTokens: ...


class TextEncoder(nn.Module, ABC):
    """Captions to features.

    width: feature width D.
    max_tokens: L, the static number of tokens, special tokens included.
    trainable: whether the parameters are trained together with the denoiser; if not they ask for no
        gradient and the module stays in eval mode.
    tokenizer: what `tokenize` calls; hand it to data workers.
    second_captions: (tokens, width) of a second encoder, 0 each where there is none.
    """

    width: int
    max_tokens: int
    trainable: bool
    tokenizer: CaptionTokenizer
    second_captions: tuple[int, int] = (0, 0)

    @property
    def pooled_width(self) -> int:
        """Width of the pooled caption."""
        return self.second_captions[1] or self.width

    def tokenize(self, captions: Sequence[str]) -> TextTokens:
        """B captions to CPU tokens of static shape. Touches no parameter. ValueError on an empty batch."""
        return self.tokenizer(captions)

    @abstractmethod
    def forward(self, tokens: TextTokens) -> TextFeatures:
        """Tokens on the encoder's device to features (B, L, D), mask (B, L) and pooled (B, D)."""


def cut_captions(captions: Sequence[str], max_tokens: int) -> list[str]:
    """The captions, each cut to the window a tokenizer reads.

    Raises ValueError for a bare string (Python would take it as a batch of characters) and for no caption.
    """
    if isinstance(captions, str):
        raise ValueError(f"tokenize takes captions, not the string {captions[:40]!r}; wrap it in a list")
    if not captions:
        raise ValueError("tokenize got 0 captions; a batch holds at least 1 (the empty caption '' is legal)")
    return [caption[: CHARS_PER_TOKEN * max_tokens] for caption in captions]


def zero_padding(features_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Features with exact zeros at padding, even where the encoder left an infinity or a NaN there."""
    return features_BLD.masked_fill(~mask_BL.unsqueeze(-1), 0.0)


def masked_mean(features_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """The mean over valid tokens, (B, D), summed in at least fp32. Expects zeros at padding."""
    count_B1 = mask_BL.sum(dim=1, keepdim=True)
    return (widen(features_BLD).sum(dim=1) / count_B1).to(features_BLD.dtype)


def build_text_encoder(c: Text, dtype: torch.dtype = torch.float32, second_tokens: bool = False) -> TextEncoder:
    """The encoder that the `text` section asks for, or the pair of them.

    dtype: of a pretrained encoder's weights and features; the byte encoder is trained and is in fp32, or fp64 for that.
    second_tokens: whether the model reads the tokens of a second one, beside its pooled caption.

    Raises ValueError for settings that contradict each other, and for files that are missing or hold
    something else than `text.kind`.
    """
    if c.kind == "bytes":
        from vidit.text.bytes import ByteTextEncoder

        for name, value in (("path", c.path), ("revision", c.revision)):
            if value is not None:
                raise ValueError(f"text.{name}={value!r} has no effect with text.kind=bytes; unset it")
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return ByteTextEncoder(c.width, c.num_layers, c.num_heads, c.max_tokens, c.hash_buckets, dtype=wide)

    from vidit.text.pretrained import PretrainedTextEncoder

    if c.path is None:
        raise ValueError(f"text.kind={c.kind} needs text.path: a folder, or a hub name with text.revision")
    first = PretrainedTextEncoder(
        c.kind, c.path, revision=c.revision, max_tokens=c.max_tokens, dtype=dtype, template=c.template,
        hidden_layer=c.hidden_layer,
    )  # fmt: skip
    if not c.has_second:
        return first
    from vidit.text.pair import PairTextEncoder

    s = c.second
    if s.path is None:
        raise ValueError(f"text.second.kind={s.kind} needs text.second.path: a folder, or a hub name with a revision")
    second = PretrainedTextEncoder(
        s.kind, s.path, revision=s.revision, max_tokens=s.max_tokens, dtype=dtype, section="text.second"
    )
    return PairTextEncoder(first, second, second_tokens)
