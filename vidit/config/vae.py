"""The autoencoder."""

from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import Field

from vidit.config.section import NotNegative, Positive, Section

Kind = Literal[
    "causal", "AutoencoderKL", "AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo", "AutoencoderKLWan"
]  # fmt: skip


class Vae(Section):
    """A causal 3D VAE (MAGVIT-v2 style, as W.A.L.T. uses it), or a frozen one that diffusers wrote."""

    weights: str | None = Field(
        None, description="folder of a trained VAE, of a VAE or a pipeline of diffusers, or a hub name"
    )
    revision: str | None = Field(None, description="commit of a hub name, 40 digits")
    kind: Kind = Field("causal", description="causal: this project's; others: a class of diffusers; the folder says")
    strides: tuple[Positive, Positive] = Field((1, 1), description="time and space, of a class of diffusers")
    latent_channels: int = Field(8, gt=0)
    patch: int = Field(1, gt=0, description="p: blocks of p x p pixels are channels of the first convolution")
    patch_frames: int = Field(1, gt=0, description="k: blocks of k frames are, too")
    fold: Literal["pixels", "haar"] = Field("pixels", description="the numbers of a block, or their Haar wavelets")
    norm: Literal["rms", "group"] = Field("rms", description="over the channels of a position, or groups in a frame")
    norm_groups: int = Field(32, gt=0)
    layers: Literal["residual", "ldm"] = Field(
        "residual",
        description="joints with shortcuts, or those of Stable Diffusion's autoencoder, whose weights then fit "
        "(vae_train.inflate)",
    )
    mid_attention: bool = Field(False, description="attention within each frame, at the coarsest level")
    base_channels: int = Field(128, gt=0)
    multipliers: tuple[Positive, ...] = Field((1, 2, 2, 4), min_length=1, description="channels of each level / base")
    num_res_blocks: tuple[NotNegative, ...] = Field((4, 4, 4, 4), description="residual blocks of each encoder level")
    decoder_res_blocks: tuple[NotNegative, ...] = Field(
        (4, 4, 4, 4), description="the same of the decoder, finest first"
    )
    spatial_down: tuple[bool, ...] = Field((True, True, True), description="level i halves H, W at its end")
    temporal_down: tuple[bool, ...] = Field((False, True, True), description="level i halves T at its end")
    max_frames: int = Field(0, ge=0, description="pixel frames a frozen VAE codes at once; 0 = the whole clip")
    tile: int = Field(0, ge=0, description="pixels of a side a frozen VAE codes at once; 0 = the whole frame")
    tile_overlap: int | None = Field(None, ge=0, description="pixels around a tile; none = all it depends on: exact")
    half_weights: bool = Field(False, description="export the weights in fp16")
    l1_weight: float = Field(1.0, ge=0)
    l2_weight: float = Field(0.0, ge=0)
    kl_weight: float = Field(1e-6, ge=0)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The named geometry of `VAE_PRESETS`, with fields changed. ValueError for a name it does not hold."""
        if name not in VAE_PRESETS:
            raise ValueError(f"no VAE preset {name!r}; use one of {' '.join(VAE_PRESETS)}")
        return cls(**{**VAE_PRESETS[name], **changes})

    @property
    def folded_channels(self) -> int:
        """Of a block of pixels, as the first convolution sees it."""
        return 3 * self.patch_frames * self.patch**2

    @property
    def is_borrowed(self) -> bool:
        """Whether a class of diffusers codes, frozen."""
        return self.kind != "causal"

    @property
    def spatial_stride(self) -> int:
        return self.strides[1] if self.is_borrowed else int(self.patch * 2 ** sum(self.spatial_down))

    @property
    def temporal_stride(self) -> int:
        return self.strides[0] if self.is_borrowed else int(self.patch_frames * 2 ** sum(self.temporal_down))

    @property
    def sees_whole_frames(self) -> bool:
        """Whether each place of a latent depends on all of its frame."""
        return self.norm == "group" or self.mid_attention

    @property
    def frames_unit(self) -> int:
        """n of the frame counts 1 + a multiple of n that can be coded.

        CogVideoX decodes latent frames in pairs, an odd one first; of an even number it makes too many frames.
        """
        return self.temporal_stride * (2 if self.kind == "AutoencoderKLCogVideoX" else 1)

    @property
    def first_frame_alone(self) -> bool:
        """Whether the first latent frame of a clip is that of the frame as an image: no norm or layer sees others."""
        return self.kind not in ("AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo")

    def faults(self) -> Iterator[str]:
        if self.is_borrowed:
            yield from self._borrowed_faults()
            return
        levels = len(self.multipliers)
        for name in ("num_res_blocks", "decoder_res_blocks"):
            if len(getattr(self, name)) != levels:
                yield f"vae.{name} has {len(getattr(self, name))} entries for {levels} levels; give {levels}"
        widths = [self.base_channels * m for m in self.multipliers]
        if self.layers == "residual" and widths[-1] % self.latent_channels:
            yield (
                f"vae.latent_channels={self.latent_channels} does not divide the last level's {widths[-1]} channels "
                "(base_channels x multiplier), as the latent's shortcut needs; change one of them"
            )
        yield from self._layer_faults()
        if self.norm == "group" and any(width % self.norm_groups for width in widths):
            legal = " ".join(str(n) for n in range(1, 65) if not any(width % n for width in widths))
            yield (
                f"vae.norm_groups={self.norm_groups} does not divide the {' '.join(map(str, widths))} channels of all "
                f"levels; use one of {legal}"
            )
        for name in ("patch", "patch_frames"):
            size = getattr(self, name)
            if self.fold == "haar" and size & (size - 1):
                yield f"vae.{name}={size} is no power of 2, which vae.fold=haar halves; use 1 2 4 or 8"
        if self.fold == "haar" and self.patch == self.patch_frames == 1:
            yield "vae.fold=haar has no effect on blocks of one pixel; set vae.patch=2 or vae.patch_frames=2"
        yield from self._part_faults()
        for name in ("spatial_down", "temporal_down"):
            if len(getattr(self, name)) != levels - 1:
                yield f"vae.{name} has {len(getattr(self, name))} entries; {levels} levels have {levels - 1} joints"
        for fine, coarse, space, time in zip(
            widths, widths[1:], self.spatial_down, self.temporal_down, strict=False
        ):  # a shortcut maps the folded channels of the finer level to groups of the coarser
            depth = fine * (4 if space else 1) * (2 if time else 1)
            if self.layers == "residual" and depth % coarse:
                yield (
                    f"vae: a joint folds {fine} channels to {depth}, which {coarse} do not divide; change "
                    "vae.base_channels or vae.multipliers"
                )

    def _layer_faults(self) -> Iterator[str]:
        """Of the kind of layers, and of attention between them."""
        for name in ("num_res_blocks", "decoder_res_blocks"):
            blocks = getattr(self, name)
            if self.layers == "ldm" and 0 in blocks:
                yield (
                    f"vae.{name}={list(blocks)}: with vae.layers=ldm a level's first block changes the width; give "
                    "each level at least 1, or use vae.layers=residual"
                )
            elif self.mid_attention and blocks[-1:] == (0,):
                yield (
                    f"vae.{name}={list(blocks)}: vae.mid_attention=true stands between blocks of the last level, which "
                    "has none; give it at least 1"
                )
        if self.layers == "ldm" and self.norm != "group":
            yield (
                f"vae.norm={self.norm} with vae.layers=ldm: Stable Diffusion's layers have group norms; set vae.norm="
                "group, or vae.layers=residual"
            )

    def _borrowed_faults(self) -> Iterator[str]:
        unit = 4 * self.spatial_stride
        if self.tile % unit:
            near = " ".join(str(n) for n in (self.tile // unit * unit, (self.tile // unit + 1) * unit) if n)
            yield (
                f"vae.tile={self.tile} is not divisible by {unit}: {self.kind} lets tiles overlap by a quarter, in "
                f"whole latents of {self.spatial_stride} pixels; use one of {near}"
            )

    def _part_faults(self) -> Iterator[str]:
        """Of the sizes that are coded at once."""
        t, s = self.temporal_stride, self.spatial_stride
        if 0 < self.max_frames < t:
            yield f"vae.max_frames={self.max_frames} is less than one latent frame; give at least {t}, or 0"
        if self.tile % s:
            near = " ".join(str(n) for n in (self.tile // s * s, (self.tile // s + 1) * s) if n)
            yield f"vae.tile={self.tile} is not divisible by the VAE's stride {s}; use one of {near}"
        if self.tile and self.sees_whole_frames and self.tile_overlap is None:
            why = "vae.norm=group: a tile sees statistics of its own"
            if self.norm != "group":
                why = "vae.mid_attention=true: a tile sees no other places"
            yield (
                f"vae.tile={self.tile} with {why}, so no overlap makes it exact; set vae.tile_overlap, such as "
                f"{8 * s}, to blend"
            )


# stable-diffusion has the layers and widths of AutoencoderKL, over time besides; SD3 and FLUX have latent_channels=16.
# walt is the tokenizer of W.A.L.T., MAGVIT-v2's without its quantizer; cogvideox, wan and wavelet have the widths and
# the latent channels of those autoencoders, with this project's joints. Blocks of the decoder: finest level first.
VAE_PRESETS: dict[str, dict[str, Any]] = {
    "walt": {},
    "cogvideox": {
        "latent_channels": 16, "norm": "group", "num_res_blocks": (3, 3, 3, 3), "decoder_res_blocks": (4, 4, 4, 4),
        "temporal_down": (True, True, False),
    },
    "wan": {
        "latent_channels": 16, "base_channels": 96, "multipliers": (1, 2, 4, 4), "num_res_blocks": (2, 2, 2, 2),
        "decoder_res_blocks": (3, 3, 3, 3),
    },
    "wavelet": {
        "latent_channels": 16, "fold": "haar", "patch": 2, "patch_frames": 2, "multipliers": (1, 2, 4),
        "num_res_blocks": (2, 2, 2), "decoder_res_blocks": (3, 3, 3), "spatial_down": (True, True),
        "temporal_down": (False, True),
    },
    "stable-diffusion": {
        "latent_channels": 4, "norm": "group", "layers": "ldm", "mid_attention": True, "multipliers": (1, 2, 4, 4),
        "num_res_blocks": (2, 2, 2, 4), "decoder_res_blocks": (3, 3, 3, 5),
    },
    "4x16x16": {
        "latent_channels": 32, "patch": 2, "num_res_blocks": (2, 3, 4, 4), "decoder_res_blocks": (3, 4, 4, 4),
        "temporal_down": (False, True, True),
    },
    "8x16x16": {
        "latent_channels": 64, "fold": "haar", "patch": 2, "patch_frames": 2, "num_res_blocks": (2, 3, 4, 4),
        "decoder_res_blocks": (3, 4, 4, 4), "temporal_down": (False, True, True),
    },
}  # fmt: skip
