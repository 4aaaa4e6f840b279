"""How an autoencoder is trained, beyond the L1, L2 and KL terms of `vae.*_weight`."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from vidit.config.section import Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class VaeTrain(Section):
    """Where an autoencoder starts from, its perceptual and wavelet terms, and the discriminator that judges it."""

    init: str | None = Field(None, description="folder of a VAE to start from; none = initial weights")
    inflate: bool = Field(False, description="init is an image VAE: its kernels become the last frame's of those here")
    freeze_encoder: bool = Field(False, description="train the decoder alone, as Align-your-Latents does on video")
    perceptual: Literal["none", "lpips", "features"] = Field(
        "none", description="distance of features: of VGG16 as LPIPS weighs them, or of the project's own small network"
    )
    perceptual_weight: float = Field(1.0, gt=0)
    perceptual_files: tuple[str, ...] = Field(
        (), description="weights: lpips = VGG16's and LPIPS's, features = what `python -m benchmarks.features` writes"
    )
    wavelet_weight: float = Field(0.0, ge=0, description="of an L1 on what is high in frequency (WF-VAE uses 0.1)")
    adversarial_weight: float = Field(0.0, ge=0, description="of the discriminator's judgement; 0 = no discriminator")
    adversarial_loss: Literal["hinge", "non_saturating"] = "hinge"
    adversarial_start: int = Field(0, ge=0, description="steps before the discriminator is trained and asked")
    adaptive: bool = Field(
        True, description="balance by gradients at the decoder's last layer, of each row (VQGAN, eq. 7)"
    )
    discriminator_channels: int = Field(64, gt=0, multiple_of=8)
    discriminator_layers: int = Field(3, gt=0, description="of stride 2")
    discriminator_rate: float = Field(1.0, gt=0, description="its learning rate, of train.learning_rate")
    discriminator_betas: tuple[Beta, Beta] = (0.5, 0.9)
    r1_weight: float = Field(0.0, ge=0, description="of the gradient penalty on real clips")
    lecam_weight: float = Field(0.0, ge=0, description="of LeCAM's regularisation (MAGVIT-v2 uses 0.001)")
    lecam_decay: float = Field(0.999, ge=0, lt=1, description="of its averages of the discriminator's answers")

    def faults(self) -> Iterator[str]:
        """What is wrong with this section alone."""
        if self.perceptual != "none" and not self.perceptual_files:
            yield (
                f"vae_train.perceptual={self.perceptual} needs weights; give their files as vae_train.perceptual_files"
            )
        if self.perceptual == "features" and len(self.perceptual_files) > 1:
            yield f"vae_train.perceptual_files names {len(self.perceptual_files)} files; features are in one, give that"
