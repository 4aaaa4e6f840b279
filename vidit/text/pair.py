"""Two frozen encoders of text at once, behind the interface of one.

FLUX, HunyuanVideo (2412.03603) and Open-Sora 2.0 (2503.09642) take token features of one, T5 or a language model, and
the pooled caption of another, CLIP; GenTron (2312.04557) lets its blocks attend to the tokens of both in turn. So the
pooled caption is always the second's, and its tokens are handed on where they are asked for. The two cut a caption
each in its own way: neither its tokens nor their number need be alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from vidit.text.encoder import CaptionTokenizer, TextEncoder, TextFeatures, TextTokens


@dataclass(frozen=True)
class PairTokenizer:
    """Captions to the tokens of the first encoder, which hold those of the second. Picklable where both are."""

    first: CaptionTokenizer
    second: CaptionTokenizer

    def __call__(self, captions: Sequence[str]) -> TextTokens:
        return replace(self.first(captions), second=self.second(captions))


class PairTextEncoder(TextEncoder):
    """Features of `first`, the pooled caption of `second`, and with `second_tokens` the features of that too.

    Both are frozen: `width` and `max_tokens` are the first's.
    """

    trainable = False

    def __init__(self, first: TextEncoder, second: TextEncoder, second_tokens: bool = False):
        super().__init__()
        assert not first.trainable, "a trained encoder stands alone"
        assert not second.trainable, "a trained encoder stands alone"
        self.first, self.second, self.second_tokens = first, second, second_tokens
        self.width, self.max_tokens = first.width, first.max_tokens
        self.second_captions = second.max_tokens, second.width
        self.tokenizer = PairTokenizer(first.tokenizer, second.tokenizer)

    @torch.no_grad()
    def forward(self, tokens: TextTokens) -> TextFeatures:
        """Tokens of both -> features of the first (B, L, D), pooled of the second (B, D2), its features (B, L2, D2)."""
        assert tokens.second is not None, "tokens of one encoder; both are made by the tokenizer of the pair"
        one: TextFeatures = self.first(tokens)
        other: TextFeatures = self.second(tokens.second)
        return replace(one, pooled_BD=other.pooled_BD, second=other if self.second_tokens else None)
