"""The step of an autoencoder: what it and its discriminator are to learn from a micro-batch.

Both learn from the same forward pass. What the decoder is told goes through the gradient of its pixels: reconstruction
and judgement are each traced back to the pixels, weighed there against one another, and from there once through the
autoencoder. So the discriminator's own weights get no gradient of the autoencoder's wish to please it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vidit import keys
from vidit.batching import numbers_per_step
from vidit.config import RunConfig
from vidit.data.loader import Batch
from vidit.evaluate.picture_quality import RADIUS, ssim_rows
from vidit.resolve import resolve
from vidit.train.step import Losses, to_pixels
from vidit.vae.adversarial import (
    Seen,
    adaptive_rows,
    fooled_rows,
    lecam_rows,
    r1_rows,
    remember,
    told_apart_rows,
    watched,
)
from vidit.vae.autoencoder import CausalVae
from vidit.vae.discriminator import Discriminator
from vidit.vae.losses import kl_rows, l1_rows, l2_rows, psnr_rows, wavelet_rows
from vidit.vae.perceptual import FeatureDistance, SceneFeatures

Parts = dict[str, Tensor]
"""Terms of the loss by name, each (B,)."""


class VaeStep:
    """L1, L2, KL, perceptual, wavelet and adversarial terms of a VAE, as `vae.*_weight` and `vae_train` say.

    The loss of a row is the autoencoder's; the discriminator's is among the parts. In validation it is without the
    adversarial term, which judges by another measure at every step.
    """

    def __init__(self, config: RunConfig, device: torch.device, perceptual: FeatureDistance | None = None):
        self.config, self.device, self.perceptual = config, device, perceptual
        self.images_per_row, self.numbers_per_step = resolve(config).latent_frames, numbers_per_step(config)

    def __call__(self, model: nn.ModuleDict, batch: Batch, purpose: str) -> Losses:
        assert batch.clips.pixels is not None
        t = self.config.vae_train
        judged = purpose == "train" and t.adversarial_weight > 0
        judged = judged and batch.rows[0] // self.numbers_per_step >= t.adversarial_start
        own = batch.rows[: len(batch.clips.keys)]
        rows, parts, features = self._terms(model, batch.clips.pixels, own, purpose, judged)
        if batch.images is not None:
            assert batch.images.pixels is not None
            start = batch.rows[len(batch.clips.keys)] * self.images_per_row
            numbers = list(range(start, start + len(batch.images.keys)))
            image_rows, *_ = self._terms(model, batch.images.pixels, numbers, f"{purpose}/image", judged)
            rows = torch.cat((rows, image_rows.view(-1, self.images_per_row).mean(1)))
        told = torch.stack([part.detach().double().mean() for part in parts.values()]).tolist()
        quantile_B = torch.zeros(len(rows), dtype=torch.float64)
        return Losses(rows, quantile_B, dict(zip(parts, told, strict=True)), features)

    def updated(self, model: nn.ModuleDict, parts: Mapping[str, float]) -> None:
        """LeCAM's averages go on with the answers of the whole step, whoever of the ranks had its rows."""
        t = self.config.vae_train
        if t.lecam_weight and "logits_real" in parts:
            judge = model["discriminator"]
            assert isinstance(judge, Discriminator)
            remember(judge.averages, parts["logits_real"], parts["logits_fake"], t.lecam_decay)

    def _terms(
        self, model: nn.ModuleDict, pixels: Tensor, numbers: list[int], purpose: str, judged: bool
    ) -> tuple[Tensor, Parts, tuple[Tensor, Tensor] | None]:
        """Loss of each row, its terms, and of validation the features of clips and reconstructions."""
        c, x, vae = self.config.vae, to_pixels(pixels, self.device).to(self._dtype), model["vae"]
        assert isinstance(vae, CausalVae)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.vae_train.freeze_encoder):
            q = vae.encode(x)
        noise = keys.normal(tuple(q.mean.shape[1:]), self.config.train.seed, f"{purpose}/posterior", numbers)
        z = q.mean + (0.5 * q.log_variance).exp() * noise.to(self.device)
        if not judged:
            out = vae.decode(z)
            rows, parts = self._reconstruction(out, x)
        else:
            with watched(vae.decoder.last) as seen:
                out = vae.decode(z)
            rows, parts = self._judged(model, vae, seen, out, x)
        of_latent = kl_rows(q)
        parts = self._in_order(parts, of_latent, out, x, purpose)
        features = None
        if purpose == "validation" and isinstance(self.perceptual, SceneFeatures):
            features = self.perceptual.video_features(x), self.perceptual.video_features(out)
        return rows + c.kl_weight * of_latent, parts, features

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self.config.train.precision == "fp64" else torch.float32

    def _in_order(self, parts: Parts, kl: Tensor, out: Tensor, x: Tensor, purpose: str) -> Parts:
        """The parts as they are reported; what only looks is taken in validation."""
        error = parts.pop("l2").detach()
        first = {"l1": parts.pop("l1"), "kl": kl, "psnr": psnr_rows(error)}
        if purpose == "validation" and min(x.shape[-2:]) > 2 * RADIUS:
            first["ssim"] = ssim_rows(out.detach(), x)
        return first | parts

    def _reconstruction(self, out: Tensor, x: Tensor) -> tuple[Tensor, Parts]:
        """What the pixels cost, and its terms."""
        c, t, error = self.config.vae, self.config.vae_train, out - x
        parts = {"l1": l1_rows(error), "l2": l2_rows(error)}
        rows = c.l1_weight * parts["l1"] + c.l2_weight * parts["l2"]
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual(out, x)
            rows = rows + t.perceptual_weight * parts["perceptual"]
        if t.wavelet_weight:
            parts["wavelet"] = wavelet_rows(error)
            rows = rows + t.wavelet_weight * parts["wavelet"]
        return rows, parts

    def _judged(self, model: nn.ModuleDict, vae: CausalVae, seen: Seen, out: Tensor, x: Tensor) -> tuple[Tensor, Parts]:
        """The same with the discriminator's judgement; its own loss adds its gradient, and nothing to the value."""
        t, judge = self.config.vae_train, model["discriminator"]
        pixels = out.detach().requires_grad_()
        rows, parts = self._reconstruction(pixels, x)
        (slope,) = torch.autograd.grad(rows.sum(), pixels)
        fake = judge(pixels)
        fooled = fooled_rows(t.adversarial_loss, fake)
        (judged,) = torch.autograd.grad(fooled.sum(), pixels, retain_graph=True)
        weight = torch.full_like(fooled, t.adversarial_weight)
        if t.adaptive:
            weight = weight * adaptive_rows(vae.decoder.last, seen, out, (slope, judged))
        slope = slope + weight[:, None, None, None, None] * judged
        taught = (out * slope).flatten(1).sum(1)
        own, more = self._discriminator(judge, x, fake)
        silent = taught - taught.detach() + own - own.detach()
        value = (rows + weight * fooled).detach()
        return value + silent, parts | {"adversarial": fooled, "adversarial_weight": weight} | more

    def _discriminator(self, judge: nn.Module, x: Tensor, fake: Tensor) -> tuple[Tensor, Parts]:
        """What the discriminator is to learn, and its terms."""
        t = self.config.vae_train
        assert isinstance(judge, Discriminator)
        x = x.detach().requires_grad_(t.r1_weight > 0)
        real = judge(x)
        apart = told_apart_rows(t.adversarial_loss, real, fake)
        parts = {"discriminator": apart}
        parts |= {"logits_real": real.flatten(1).mean(1), "logits_fake": fake.flatten(1).mean(1)}
        rows = apart
        if t.r1_weight:
            parts["r1"] = r1_rows(real, x)
            rows = rows + t.r1_weight * parts["r1"]
        if t.lecam_weight:
            parts["lecam"] = lecam_rows(real, fake, judge.averages)
            rows = rows + t.lecam_weight * parts["lecam"]
        return rows, parts
