"""Sets of latents, as `vidit encode` writes them: shards like those of videos, with tensors in the place of a video.

A clip is ``<key>.json``, the sidecar of the video, and ``<key>.safetensors`` with ``mean`` and ``std`` of the VAE's
posterior, raw and (C, T, H, W), and where a frozen text encoder read the caption ``text`` (n, E) of its n valid tokens
and ``pooled`` (E,). Of two encoders there are ``text`` of the first, ``second_pooled`` of the second, and where the
model reads its tokens ``second_text``. The index gives frames, size and rate of the cut that was encoded.
``dataset.json`` says under ``encoded`` what it was made with and, once, the text of the empty caption, which caption
dropout takes instead.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vidit.data.limits import ClipError, ShardError
from vidit.data.manifest import MANIFEST, manifest_text
from vidit.data.shards import ClipRef
from vidit.data.storage import Folder
from vidit.data.tar import CURE, LATENT_SUFFIX
from vidit.text.encoder import TextFeatures

ENCODED = "encoded"


@dataclass(frozen=True)
class CaptionText:
    """The features of one caption: of its valid tokens (n, E), and pooled (E,), with two encoders of the second.

    `second` are the features of the second's valid tokens, where they are kept, `paired` says that there are two.
    """

    features: Tensor
    pooled: Tensor
    second: Tensor | None = None
    paired: bool = False


@dataclass(frozen=True)
class StoredText:
    """The text of those captions of a batch that were read by the encoder before: `places` are theirs among all."""

    places: tuple[int, ...]
    features: TextFeatures


@dataclass(frozen=True)
class EncodedClip:
    """What is stored of one clip: mean of the posterior (C, T, H, W) fp32, and its caption's text, if there is any."""

    mean: Tensor
    text: CaptionText | None


@dataclass(frozen=True)
class Encoding:
    """What a set was made with, as its manifest has it, and the text of the empty caption, if captions have text."""

    facts: dict[str, Any]
    empty: CaptionText | None


def is_encoded(ref: ClipRef) -> bool:
    """Whether a clip is latents."""
    return ref.video_suffix == LATENT_SUFFIX


def clip_bytes(mean: Tensor, std: Tensor, text: CaptionText | None) -> bytes:
    """The member of one clip."""
    return save({"mean": mean.contiguous(), "std": std.contiguous(), **_text_tensors(text)})


def parse_clip(content: bytes, shape: Sequence[int]) -> EncodedClip:
    """The inverse, for a latent of `shape` (C, T, H, W). ClipError for anything else."""
    tensors = _tensors(content)
    if "mean" not in tensors or list(tensors["mean"].shape) != list(shape):
        found = list(tensors["mean"].shape) if "mean" in tensors else "nothing"
        raise ClipError(f"the latent is {found}, the run needs {list(shape)}")
    return EncodedClip(tensors["mean"].float(), _text(tensors))


def encoded_facts(facts: dict[str, Any], empty: CaptionText | None) -> dict[str, Any]:
    """The manifest's entry `encoded`."""
    text = base64.b64encode(save(_text_tensors(empty))).decode() if empty else None
    return {**facts, "empty_caption": text}


def read_encoding(folder: Folder) -> Encoding | None:
    """What the set in a folder was made with; None where it holds videos. ShardError for a damaged manifest."""
    text = manifest_text(folder)
    facts = json.loads(text).get(ENCODED) if text else None
    if facts is None:
        return None
    try:
        stored = facts.pop("empty_caption")
        empty = _text(_tensors(base64.b64decode(stored))) if stored else None
        _check(facts)
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise ShardError(f"{folder}/{MANIFEST}: `{ENCODED}` is damaged: {error}; {CURE}") from error
    return Encoding(facts, empty)


def _check(facts: dict[str, Any]) -> None:
    """What a run compares must be there and of its kind. KeyError, TypeError."""
    vae, text = facts["vae"], facts["text"]
    words = [vae["encoder_sha256"]] if text is None else [vae["encoder_sha256"], text["kind"], text["sha256"]]
    kinds = [isinstance(word, str) for word in words] + [isinstance(facts["fps"], int | float)]
    kinds += [len(shape) == 3 and all(isinstance(side, int) for side in shape) for shape in facts["shapes"]]
    if not all(kinds):
        raise TypeError("fps, shapes or a hash is of another kind than `vidit encode` writes")


def stored_text(rows: Sequence[tuple[int, CaptionText]], num_tokens: int, second_tokens: int = 0) -> StoredText | None:
    """(place, text) of each caption that has one, padded to `num_tokens` as the encoder pads; None without any.

    `second_tokens` is the same of a second encoder.
    """
    if not rows:
        return None
    pooled = torch.stack([text.pooled for _, text in rows])
    features, mask = _padded([text.features for _, text in rows], num_tokens)
    others, second = [text.second for _, text in rows if text.second is not None], None
    if len(others) == len(rows):
        second = TextFeatures(*_padded(others, second_tokens), pooled)
    return StoredText(tuple(place for place, _ in rows), TextFeatures(features, mask, pooled, second))


def _padded(captions: Sequence[Tensor], num_tokens: int) -> tuple[Tensor, Tensor]:
    """Features (B, L, E) and which are valid (B, L)."""
    lengths = torch.tensor([len(caption) for caption in captions])
    padded = pad_sequence(list(captions), batch_first=True)
    features = torch.nn.functional.pad(padded, (0, 0, 0, num_tokens - padded.shape[1]))
    return features, torch.arange(num_tokens) < lengths[:, None]


def _text_tensors(text: CaptionText | None) -> dict[str, Tensor]:
    if text is None:
        return {}
    tensors = {"text": text.features, "second_pooled" if text.paired else "pooled": text.pooled}
    tensors |= {} if text.second is None else {"second_text": text.second}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _text(tensors: dict[str, Tensor]) -> CaptionText | None:
    if "text" not in tensors:
        return None
    text, second, paired = tensors["text"], tensors.get("second_text"), "second_pooled" in tensors
    pooled = tensors.get("second_pooled" if paired else "pooled", torch.empty(0))
    # With two encoders the vector is as wide as the second's features, which need not be kept.
    width = second.shape[1:] if second is not None else pooled.shape if paired else text.shape[1:]
    if text.ndim != 2 or pooled.ndim != 1 or pooled.shape != width:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items() if "text" in name or "pooled" in name}
        raise ClipError(f"its text is {shapes}, not (n, E) of tokens and (E) pooled")
    return CaptionText(text, pooled, second, paired)


def _tensors(content: bytes) -> dict[str, Tensor]:
    try:
        return load(content)
    except SafetensorError as error:
        raise ClipError(f"not safetensors: {error}") from error
