"""A text encoder without a vocabulary file, trained jointly with the denoiser.

A caption is split into words; a word is one token, and its embedding is the sum of the table rows that its
byte n-grams (n = 1..5, with word-boundary marks) and the whole word hash to, as in fastText (Bojanowski et
al., "Enriching Word Vectors with Subword Information", arXiv 1607.04606, section 3.2) and the hash n-gram
embeddings of BLT (Pagnoni et al., "Byte Latent Transformer", arXiv 2412.09871, section 3.2.1). Words that
share a stem share rows, and no word of any language is unknown. A begin token and `num_layers`
bidirectional pre-norm transformer layers follow.

The sum is layer-normed at once, so neither the number of n-grams in a word nor the initial scale of the
table reaches the layers. Everything runs in fp32 unless `dtype` says otherwise: the encoder is tiny beside
the denoiser, and its gradient arrives through few rows. `__init__` allocates only, no buffer exists, so it
builds on the meta device; positions are made in `forward`.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidit.dtypes import widen
from vidit.text.encoder import TextEncoder, TextFeatures, TextTokens, cut_captions, masked_mean, zero_padding

# The table's first rows: 0 is padding (never read), 1 the begin token, the rest are hashed to.
PAD_ROW, BEGIN_ROW, NUM_RESERVED_ROWS = 0, 1, 2

# 48 slots hold the whole word and all 3-, 4- and 5-grams of the longest ASCII piece (16 + 15 + 14 of them),
# and every n-gram of a word of up to 9 letters. Short n-grams tell least: they go last and are cut first.
MAX_WORD_CHARS = 16
MAX_NGRAMS = 48
NGRAM_ORDER = (3, 4, 5, 2, 1)

# Half the usual width: most of the capacity is in the table, and on a CPU the encoder must stay small beside
# a small denoiser.
MLP_RATIO = 2

# 0xFE and 0xFF occur in no UTF-8 text, so a mark is never mistaken for a letter.
WORD_BEGIN, WORD_END = b"\xfe", b"\xff"

# Characters that are a token of their own: punctuation and symbols, CJK and kana (written without blanks),
# emoji. Everything else that is no blank builds words; a class of separators, because `\w` breaks
# Indic words at their vowel signs.
_ALONE = (
    "!-/:-@\\[-`{-~\u00a1-\u00bf\u2000-\u2bff\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
    "\U0001f000-\U0001faff\U00020000-\U0003ffff"
)
_WORD = re.compile(f"[^\\s{_ALONE}]{{1,{MAX_WORD_CHARS}}}|[{_ALONE}]")


def split_words(caption: str) -> Iterator[str]:
    """Words, single marks and single ideographs of a caption, in order; pieces of at most 16 characters.

    NFKC first, so that composed and decomposed accents, and full-width and ASCII letters, are one word.
    """
    return (match.group() for match in _WORD.finditer(unicodedata.normalize("NFKC", caption)))


def word_ngrams(word: bytes) -> list[bytes]:
    """The marked whole word and its byte n-grams in the order in which they fill the slots, at most 48."""
    marked = WORD_BEGIN + word + WORD_END
    grams = [b"\x00" + marked]  # the zero byte keeps a short whole word apart from the equal n-gram
    for n in NGRAM_ORDER:
        text = word if n == 1 else marked  # a mark on its own says nothing
        grams += [text[i : i + n] for i in range(len(text) - n + 1)]
    return grams[:MAX_NGRAMS]


# A pure function of its arguments, remembered per process: a data set has few distinct words. 2^16 words
# take about 20 MB.
@lru_cache(maxsize=1 << 16)
def word_rows(word: str, hash_buckets: int, fold_case: bool) -> bytes:
    """The table rows of a word as MAX_NGRAMS native int32, padded with PAD_ROW.

    blake2 and not `hash()`, which differs from process to process: the rows are part of the weights.
    """
    # surrogatepass: a lone surrogate (broken JSON escapes hold them) is odd text, not an error.
    encoded = (word.casefold() if fold_case else word).encode("utf-8", "surrogatepass")
    num_hashed = hash_buckets - NUM_RESERVED_ROWS
    rows = array("i", bytes(4 * MAX_NGRAMS))
    for slot, gram in enumerate(word_ngrams(encoded)):
        digest = int.from_bytes(blake2b(gram, digest_size=8).digest(), "little")
        rows[slot] = NUM_RESERVED_ROWS + digest % num_hashed
    return rows.tobytes()


@dataclass(frozen=True)
class ByteTokenizer:
    """Captions to n-gram rows, ids (B, L, MAX_NGRAMS) int32. Stateless, hence picklable and deterministic."""

    max_tokens: int
    hash_buckets: int
    fold_case: bool = True

    def __call__(self, captions: Sequence[str]) -> TextTokens:
        begin = array("i", [BEGIN_ROW]).tobytes().ljust(4 * MAX_NGRAMS, b"\0")
        buffer = bytearray()
        for caption in cut_captions(captions, self.max_tokens):
            words = islice(split_words(caption), self.max_tokens - 1)
            rows = [begin, *(word_rows(word, self.hash_buckets, self.fold_case) for word in words)]
            buffer += b"".join(rows).ljust(4 * MAX_NGRAMS * self.max_tokens, b"\0")
        ids_BLG = torch.frombuffer(buffer, dtype=torch.int32).view(len(captions), self.max_tokens, MAX_NGRAMS)
        is_word_BL = ids_BLG[:, :, 0] != PAD_ROW  # slot 0 holds the whole word or the begin token
        return TextTokens(ids_BLG, is_word_BL)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer` in the dtype of the activations, whatever the weights are stored in."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """`layer` in at least fp32, returned in the dtype of the activations."""
    weight, bias = widen(layer.weight), widen(layer.bias)
    return F.layer_norm(widen(x), layer.normalized_shape, weight, bias, layer.eps).to(x.dtype)


def sinusoidal_positions(num_tokens: int, width: int, device: torch.device) -> Tensor:
    """(L, D) fp32 of unit amplitude (Vaswani et al., "Attention Is All You Need", section 3.5)."""
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angles = torch.arange(num_tokens, device=device, dtype=torch.float32)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class ByteTextLayer(nn.Module):
    """A pre-norm bidirectional transformer layer, (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.head_dim = width // num_heads
        self.attn_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, MLP_RATIO * width)
        self.down = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        qkv_BLD = _linear(self.qkv, _norm(self.attn_norm, x_BLD))
        q_BNLK, k_BNLK, v_BNLK = torch.unflatten(qkv_BLD, -1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        # Padding is hidden as a key only: its queries see the begin token at least, so no row is empty.
        keys_B11L = mask_BL[:, None, None, :]
        mixed_BNLK = F.scaled_dot_product_attention(q_BNLK, k_BNLK, v_BNLK, attn_mask=keys_B11L)
        x_BLD = x_BLD + _linear(self.out, mixed_BNLK.transpose(1, 2).flatten(-2))
        hidden_BLF = F.gelu(_linear(self.up, _norm(self.mlp_norm, x_BLD)))
        return x_BLD + _linear(self.down, hidden_BLF)


class ByteTextEncoder(TextEncoder):
    """Hashed byte n-grams and a small transformer, trained jointly; the default encoder.

    width: D, even and divisible by num_heads. hash_buckets: rows of the n-gram table, the two reserved ones
    included. fold_case: hash `Cat` and `cat` to the same rows. dtype: of the layers and of the features.

    Raises ValueError when the numbers do not fit together.
    """

    trainable = True

    def __init__(
        self,
        width: int,
        num_layers: int,
        num_heads: int,
        max_tokens: int,
        hash_buckets: int,
        fold_case: bool = True,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if width % num_heads or width % 2:
            raise ValueError(f"text.width={width} must be even and divisible by text.num_heads={num_heads}")
        if max_tokens < 2:
            raise ValueError(f"text.max_tokens={max_tokens} has no room beside the begin token; use at least 2")
        if hash_buckets <= NUM_RESERVED_ROWS:
            raise ValueError(f"text.hash_buckets={hash_buckets} must exceed the 2 reserved rows")
        self.width, self.max_tokens, self.dtype = width, max_tokens, dtype
        self.tokenizer = ByteTokenizer(max_tokens, hash_buckets, fold_case)
        self.table = nn.Embedding(hash_buckets, width)
        self.embed_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(ByteTextLayer(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: TextTokens) -> TextFeatures:
        """ids (B, L, MAX_NGRAMS) -> features (B, L, D) and the masked mean (B, D), in `dtype`."""
        mask_BL = tokens.mask_BL
        # One bag a word sums its rows without the (B, L, n-grams, D) intermediate.
        rows_XG = tokens.ids.flatten(0, 1)  # X = B * L
        words_XD = F.embedding_bag(rows_XG, self.table.weight, mode="sum", padding_idx=PAD_ROW)
        words_BLD = torch.unflatten(_norm(self.embed_norm, words_XD.to(self.dtype)), 0, mask_BL.shape)
        positions_LD = sinusoidal_positions(mask_BL.shape[1], self.width, mask_BL.device)
        x_BLD = words_BLD + positions_LD.to(self.dtype)
        for layer in self.layers:
            x_BLD = layer(x_BLD, mask_BL)
        features_BLD = zero_padding(_norm(self.norm, x_BLD), mask_BL)
        return TextFeatures(features_BLD, mask_BL, masked_mean(features_BLD, mask_BL))
