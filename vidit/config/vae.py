"""The autoencoder."""

from collections.abc import Iterator

from pydantic import Field

from vidit.config.section import NotNegative, Positive, Section


class Vae(Section):
    """A causal 3D VAE (MAGVIT-v2 style, as W.A.L.T. uses it)."""

    weights: str | None = Field(None, description="folder with config.json and model.safetensors")
    latent_channels: int = Field(8, gt=0)
    patch: int = Field(1, gt=0, description="pixels folded p x p into channels before the first convolution")
    base_channels: int = Field(128, gt=0)
    multipliers: tuple[Positive, ...] = Field((1, 2, 2, 4), min_length=1, description="channels of each level / base")
    num_res_blocks: tuple[NotNegative, ...] = Field((4, 4, 4, 4), description="residual blocks of each encoder level")
    decoder_res_blocks: tuple[NotNegative, ...] = Field(
        (4, 4, 4, 4), description="the same of the decoder, finest first"
    )
    spatial_down: tuple[bool, ...] = Field((True, True, True), description="level i halves H, W at its end")
    temporal_down: tuple[bool, ...] = Field((False, True, True), description="level i halves T at its end")
    half_weights: bool = Field(False, description="export the weights in fp16")
    l1_weight: float = Field(1.0, ge=0)
    l2_weight: float = Field(0.0, ge=0)
    kl_weight: float = Field(1e-6, ge=0)

    @property
    def spatial_stride(self) -> int:
        return int(self.patch * 2 ** sum(self.spatial_down))

    @property
    def temporal_stride(self) -> int:
        return int(2 ** sum(self.temporal_down))

    def faults(self) -> Iterator[str]:
        levels = len(self.multipliers)
        for name in ("num_res_blocks", "decoder_res_blocks"):
            if len(getattr(self, name)) != levels:
                yield f"vae.{name} has {len(getattr(self, name))} entries for {levels} levels; give {levels}"
        widths = [self.base_channels * m for m in self.multipliers]
        if widths[-1] % self.latent_channels:
            yield (
                f"vae.latent_channels={self.latent_channels} does not divide the last level's {widths[-1]} channels "
                "(base_channels x multiplier), as the latent's shortcut needs; change one of them"
            )
        for name in ("spatial_down", "temporal_down"):
            if len(getattr(self, name)) != levels - 1:
                yield f"vae.{name} has {len(getattr(self, name))} entries; {levels} levels have {levels - 1} joints"
        for fine, coarse, space, time in zip(
            widths, widths[1:], self.spatial_down, self.temporal_down, strict=False
        ):  # a shortcut maps the folded channels of the finer level to groups of the coarser
            depth = fine * (4 if space else 1) * (2 if time else 1)
            if depth % coarse:
                yield (
                    f"vae: a joint folds {fine} channels to {depth}, which {coarse} do not divide; change "
                    "vae.base_channels or vae.multipliers"
                )
