"""One micro-batch of videos and captions -> what is stored of each: the work of `vidit encode` on the device.

The VAE's posterior is kept raw, as mean and std in the dtype of storage; rounding it must stay below the posterior's
own noise, so the largest rounding is measured in units of std. Bytes depend on nothing but the micro-batch, which is
cut from a shard's clips alike on any number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vidit.config import Vae
from vidit.data.encoded import CaptionText, clip_bytes
from vidit.text.encoder import TextEncoder, TextFeatures
from vidit.train.step import to_pixels
from vidit.vae.autoencoder import Autoencoder
from vidit.vae.coding import encode_clip

Storage = Literal["fp16", "bf16", "fp32"]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Stored:
    """The member of one clip, and by how much of the posterior's std storing moved its mean at most."""

    content: bytes
    rounding: float


class ClipEncoder:
    """The VAE and, where it is frozen, the text encoder; both on the device already.

    `limits` says how much of a clip the VAE codes at once.
    """

    def __init__(self, vae: Autoencoder, limits: Vae, text: TextEncoder | None, device: torch.device, storage: Storage):
        self.vae, self.limits, self.device, self.dtype, self.storage = vae, limits, device, DTYPES[storage], storage
        self.text = text if text is not None and not text.trainable else None

    @torch.no_grad()
    def encode(self, pixels: Sequence[Tensor], captions: Sequence[str]) -> list[Stored | str]:
        """Of each clip (T, H, W, 3) uint8 its member, or why it has none.

        ValueError where a latent is larger than the dtype of storage can hold.
        """
        posterior = encode_clip(self.vae, to_pixels(torch.stack(list(pixels)), self.device), self.limits)
        std = (0.5 * posterior.log_variance).exp()
        texts = self.texts(captions)
        pairs = zip(posterior.mean.cpu(), std.cpu(), texts, strict=True)
        return [self._stored(mean, deviation, text) for mean, deviation, text in pairs]

    def texts(self, captions: Sequence[str]) -> Sequence[CaptionText | None]:
        """What is stored of captions: the valid tokens, on the CPU; None each without a frozen encoder."""
        if self.text is None:
            return [None] * len(captions)
        with torch.no_grad():
            found: TextFeatures = self.text(self.text.tokenize(captions).to(self.device))
        pooled, paired = self._narrowed(found.pooled_BD, "text"), bool(self.text.second_captions[0])
        features, second = self._valid(found), None if found.second is None else self._valid(found.second)
        return [
            CaptionText(features[row], pool.clone(), None if second is None else second[row], paired)
            for row, pool in enumerate(pooled)
        ]

    def _valid(self, found: TextFeatures) -> list[Tensor]:
        """Of each caption its valid tokens (n, E), narrowed."""
        lengths = found.mask_BL.sum(1).tolist()
        for mask, length in zip(found.mask_BL, lengths, strict=True):
            assert bool(mask[:length].all()), "an encoder pads on the right"
        features = self._narrowed(found.features_BLD, "text")
        # Copies: a view would be stored with all of its padding.
        return [row[:length].clone() for row, length in zip(features, lengths, strict=True)]

    def _stored(self, mean: Tensor, std: Tensor, text: CaptionText | None) -> Stored | str:
        if not (bool(mean.isfinite().all()) and bool(std.isfinite().all())):
            return "its latent is not finite"
        kept = self._narrowed(mean, "the latent")
        rounding = float(((kept.to(mean.dtype) - mean).abs() / std).max())
        return Stored(clip_bytes(kept, self._narrowed(std, "the std of the latent"), text), rounding)

    def _narrowed(self, values: Tensor, what: str) -> Tensor:
        kept = values.cpu().to(self.dtype)
        if not bool(kept.isfinite().all()):
            raise ValueError(
                f"{what} reaches {float(values.abs().max()):g}, and {self.storage} holds at most "
                f"{torch.finfo(self.dtype).max:g}; use --dtype bf16 or fp32"
            )
        return kept
