"""The 3D U-Net, and its named geometries: what video diffusion was before transformers, as a baseline."""

from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import Field

from vidit.config.section import AttentionBackend, NotNegative, Positive, Section

TemporalPart = Literal["self", "cross", "mlp"]

# Fields that make a U-Net one of a family; papers.md, section 3.
#   vdm           Video Diffusion Models (2204.03458): attention over time with relative positions, kernels 1x3x3
#   make-a-video  (2209.14792): a convolution over time behind each spatial part, attention that begins as the identity
#   modelscope    ModelScopeT2V (2308.06571): four convolutions, two attentions over time
#   video-ldm     Align-your-Latents (2304.08818) and SVD (2311.15127): learned mixing
UNET_FAMILIES: dict[str, dict[str, Any]] = {
    "vdm": {
        "temporal": "identity", "temporal_convs": 0, "temporal_attention": ("self",), "temporal_position": "bias",
    },
    "make-a-video": {
        "temporal": "identity", "temporal_convs": 1, "temporal_attention": ("self",),
        "temporal_position": "none",
    },
    "modelscope": {
        "temporal": "identity", "temporal_convs": 4, "temporal_conv_time": False,
        "temporal_attention": ("self", "self", "mlp"), "temporal_position": "none",
    },
    "video-ldm": {
        "temporal": "mixed", "temporal_convs": 2, "temporal_conv_time": True,
        "temporal_attention": ("mlp", "self", "cross", "mlp"), "temporal_position": "sinusoid",
    },
}  # fmt: skip

# The spatial layers of all but "demo" are those of Stable Diffusion 2.1, the default.
_DEMO: dict[str, Any] = {
    "channels": 64, "multipliers": (1, 2), "num_res_blocks": 1, "attention": (True, True), "head_dim": 32,
    "norm_groups": 16,
}  # fmt: skip
UNET_PRESETS: dict[str, dict[str, Any]] = {
    "demo": _DEMO,
    "sd-2.1": {"temporal": "none"},
    "modelscope": UNET_FAMILIES["modelscope"],
    "video-ldm": UNET_FAMILIES["video-ldm"],
}


class Unet(Section):
    """Spatial layers of an image model, with layers over time behind them; images pass those unchanged."""

    channels: int = Field(320, gt=0, multiple_of=2, description="of the first level")
    multipliers: tuple[Positive, ...] = Field(
        (1, 2, 4, 4),
        min_length=1,
        description="channels of each level, in those of the first; each halves rows and columns",
    )
    num_res_blocks: int = Field(
        2, gt=0, description="residual blocks of a level on the way down; one more on the way up"
    )
    attention: tuple[bool, ...] = Field(
        (True, True, True, False), description="levels with attention; the bottom has it always"
    )
    head_dim: int = Field(64, gt=0)
    num_heads: NotNegative = Field(0, description="heads of every attention; 0 = channels / head_dim")
    norm_groups: int = Field(32, gt=0)
    cross_attention: bool = Field(True, description="spatial attention is followed by attention to the text")
    pooled_text: bool = Field(False, description="add the pooled caption to the time embedding")
    frame_rate: bool = Field(
        False, description="add each clip's frames a second to the time embedding (Make-A-Video, SVD); images have 0"
    )
    temporal: Literal["none", "identity", "mixed"] = Field(
        "identity",
        description="layers over time: none (an image model), residuals that begin at zero, or those times 1 - alpha, "
        "with an alpha that each layer learns (Align-your-Latents, SVD)",
    )
    temporal_convs: NotNegative = Field(2, description="convolutions over three frames, behind each residual block")
    temporal_conv_time: bool = Field(True, description="the diffusion time is added behind the first of them")
    temporal_attention: tuple[TemporalPart, ...] = Field(
        ("self", "mlp"), description="what follows each spatial attention: attention over frames, to the text, an MLP"
    )
    temporal_position: Literal["none", "sinusoid", "bias"] = Field(
        "sinusoid",
        description="how attention over frames knows their order: sinusoids through an MLP, or a learned bias",
    )
    attention_backend: AttentionBackend = "sdpa"

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The named geometry of `UNET_PRESETS`, with fields changed. ValueError for a name it does not hold."""
        if name not in UNET_PRESETS:
            raise ValueError(f"no U-Net preset {name!r}; use one of {' '.join(UNET_PRESETS)}")
        return cls(**{**UNET_PRESETS[name], **changes})

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    @property
    def cond_width(self) -> int:
        """Width of the time embedding."""
        return 4 * self.channels

    @property
    def adds_time(self) -> bool:
        """Whether convolutions over time are given the diffusion time."""
        return self.temporal_conv_time and self.temporal_convs > 1

    @property
    def has_self_attention(self) -> bool:
        """Whether frames attend to each other."""
        return self.temporal != "none" and "self" in self.temporal_attention

    @property
    def reads_text(self) -> bool:
        """Whether any caption reaches the network."""
        return (
            self.cross_attention or self.pooled_text or ("cross" in self.temporal_attention and self.temporal != "none")
        )

    @property
    def patch(self) -> tuple[int, int, int]:
        """A U-Net works on the places of the latent."""
        return 1, 1, 1

    @property
    def self_conditioning(self) -> float:
        """Share of the rows with a first pass."""
        return 0.0

    def heads(self, width: int) -> int:
        """Of an attention on so many channels."""
        return self.num_heads or width // self.head_dim

    def faults(self) -> Iterator[str]:
        """What is wrong with this section alone."""
        if len(self.attention) != len(self.multipliers):
            yield (
                f"unet.attention={list(self.attention)} says it of {len(self.attention)} levels, but unet.multipliers="
                f"{list(self.multipliers)} has {len(self.multipliers)}; give one value for each"
            )
        # The bottom has the channels of the last level, and attention whatever unet.attention says.
        attended = {w for w, on in zip(self.widths, self.attention, strict=False) if on} | {self.widths[-1]}
        for width in sorted(set(self.widths)):
            if width % self.norm_groups:
                yield f"unet.norm_groups={self.norm_groups} does not divide {width} channels; {_legal(width)}"
            if width in attended and not self.num_heads and width % self.head_dim:
                yield f"unet.head_dim={self.head_dim} does not divide {width} channels; {_legal(width)}"
            if width in attended and self.num_heads and width % self.num_heads:
                yield f"unet.num_heads={self.num_heads} does not divide {width} channels; {_legal(width)}"
        if self.temporal != "none" and not self.temporal_convs and not self.temporal_attention:
            yield (
                f"unet.temporal={self.temporal} without temporal_convs and temporal_attention has no layer over time; "
                "give one of them, or use temporal=none"
            )
        if self.attention_backend == "flash":
            if self.reads_text:
                yield "unet.attention_backend=flash takes no mask over text; use sdpa"
            if self.has_self_attention and self.temporal_position == "bias":
                yield "unet.attention_backend=flash takes no position bias; use temporal_position=sinusoid"


def _legal(width: int) -> str:
    return f"use one of {' '.join(str(n) for n in range(1, 65) if width % n == 0)}"
