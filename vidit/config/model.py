"""The diffusion transformer, and its named sizes."""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, overload

from pydantic import BeforeValidator, Discriminator, Field, PositiveFloat, Tag

from vidit.config.model_faults import model_faults
from vidit.config.presets import PRESETS
from vidit.config.section import AttentionBackend, Positive, Section

Window = tuple[int, int, int]
Skip = tuple[Literal["single", "group"], Positive]
AnyWindow = Window | Skip
"""Three numbers, or a pair that skips."""


def _named(yes: str) -> BeforeValidator:
    """Takes true for that name and false for "none"."""
    return BeforeValidator(lambda value: {True: yes, False: "none"}[value] if isinstance(value, bool) else value)


def _window_kind(value: object) -> str:
    """Which of the two a window is meant to be, so that a fault is told of that alone."""
    return "skip" if isinstance(value, list | tuple) and any(isinstance(part, str) for part in value) else "box"


def _flat(value: object) -> object:
    """Takes p for (1, p, p)."""
    return (1, value, value) if isinstance(value, int) and not isinstance(value, bool) else value


class Model(Section):
    """A spatiotemporal patch-token DiT: the parts of W.A.L.T. (2312.06662) by default, of other families by name."""

    num_layers: int = Field(24, gt=0)
    num_single_layers: int = Field(
        0,
        ge=0,
        description="the last so many of those have attention and MLP side by side and one set of weights for video "
        "and text (FLUX, HunyuanVideo)",
    )
    width: int = Field(1024, gt=0)
    num_heads: int = Field(16, gt=0)
    mlp_width: int = Field(4096, gt=0)
    patch: Annotated[tuple[Positive, Positive, Positive], BeforeValidator(_flat)] = Field(
        (1, 1, 1), description="latent frames, rows and columns of a token; one number p is (1, p, p)"
    )
    windows: tuple[
        Annotated[Annotated[Window, Tag("box")] | Annotated[Skip, Tag("skip")], Discriminator(_window_kind)], ...
    ] = Field(
        ((1, 0, 0), (0, 8, 8)),
        min_length=1,
        description="attention windows (t, h, w) in tokens, used by the blocks in turn; 0 = the whole axis; or "
        "(single, k), (group, k): every k-th token of the clip, or group of k (Skiparse, Open-Sora-Plan)",
    )
    full_ends: int = Field(0, ge=0, description="blocks at either end that attend to all tokens instead")
    temporal_attention: bool = Field(
        False,
        description="behind the attention to text another one, of each place through time, whose output starts at zero "
        "(GenTron)",
    )
    motion_free: float = Field(
        0.0, ge=0, le=1, description="share of the training clips in which that sees its own frame alone (GenTron)"
    )
    image_attention: Literal["identity", "frame"] = Field(
        "identity",
        description="images in windows that span frames: pass unchanged (W.A.L.T.), or attend within their frame",
    )
    relative_position: Literal["bias", "rope", "none"] = "bias"
    rope_split: Literal["quarter", "third", "eighth", "time"] = Field(
        "quarter",
        description="a head's pairs for time: 1/4 (CogVideoX), 1/3 (Wan), 1/8 (FLUX), height and width sharing the "
        "rest; or all of them (STDiT3)",
    )
    rope_theta: float = Field(10_000.0, gt=1, description="base of the angles (HunyuanVideo: 256)")
    absolute_position: Annotated[
        Literal["none", "learned", "sincos", "space", "space_then_time"], _named("learned")
    ] = Field(
        "learned",
        description="added to the tokens: tables of time and space, sinusoids of both (CogVideoX), of space alone "
        "(STDiT3), or those of space at the start and of time before the first block that spans latent frames (Latte); "
        "true = learned",
    )
    position_scale: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = Field(
        (1.0, 1.0, 1.0), description="what the sinusoids divide the places (t, h, w) by"
    )
    position_span: int = Field(
        0,
        ge=0,
        description="space, space_then_time: height and width count to that, however many tokens; 0 = to their number",
    )
    qk_norm: Annotated[Literal["none", "head", "head_affine", "head_rms", "width"], _named("head")] = Field(
        "head",
        description="of queries and keys: layer norm of each head, with scale or with shift too, RMS norm of each "
        "(FLUX, STDiT3) or over all heads (Wan); true = head",
    )
    norm_affine: bool = Field(False, description="scale and shift of their own in the norms of the blocks and the head")
    norm_eps: float = Field(1e-6, gt=0, description="of those norms, and of the one before cross-attention")
    mlp_norm_eps: float = Field(0.0, ge=0, description="of the norm before the MLP; 0 = norm_eps")
    cross_attention: Literal["none", "per_frame", "all", "joint"] = Field(
        "per_frame",
        description="blocks that attend to text: those whose window is one latent frame, or all; joint: text tokens "
        "take part in self-attention (CogVideoX)",
    )
    text_weights: Literal["shared", "own"] = Field(
        "shared", description="joint: text goes through the video's weights (CogVideoX) or through its own (MMDiT)"
    )
    cross_keys: Literal["text", "video_and_text"] = "video_and_text"
    cross_text: Literal["first", "interleaved"] = Field(
        "first",
        description="whose tokens blocks attend to: those of text, or in even blocks those of text.second (GenTron)",
    )
    cross_norm: Literal["none", "bare", "affine"] = Field(
        "bare", description="layer norm before cross-attention: none, without parameters, or with scale and shift (Wan)"
    )
    learned_variance: bool = Field(
        False, description="as many output channels again, which nothing reads: Latte's checkpoints have them"
    )
    pooled_text: bool = Field(False, description="add the pooled caption to the time embedding (GenTron)")
    pooled_embedding: Literal["linear", "mlp"] = Field("linear", description="of it: one layer, or two (FLUX)")
    pooled_width: int = Field(0, ge=0, description="width of the pooled caption; 0 = that of the text features")
    guidance: float = Field(
        0.0, ge=0, description="the guidance scale that a distilled model is told beside the time; 0 = it takes none"
    )
    frame_rate: bool = Field(
        False, description="add each clip's frames a second to the time embedding (Open-Sora 1.2); images have 0"
    )
    modulation: Literal["projected", "table"] = Field(
        "projected", description="AdaLN by projection of the time, or adaLN-single: one for all blocks + a table each"
    )
    adaln_rank: int = Field(2, ge=0, description="AdaLN-LoRA rank; 0 gives every block a modulation of its own")
    frame_times: bool = Field(
        False, description="a diffusion time for each latent frame, so that given ones are clean (diffusion.given)"
    )
    given_channels: bool = Field(
        False,
        description="given latent frames and their mask beside the noisy latent, by weights that start at zero "
        "(Open-Sora-Plan; diffusion.given)",
    )
    time_frequencies: int = Field(256, ge=4, multiple_of=2, description="sinusoids of the diffusion time")
    time_spacing: Literal["open", "closed"] = Field(
        "open",
        description="their frequencies go down from 1 and end before 1/10000 (DiT), or at it, as in DiT's class in "
        "diffusers",
    )
    time_width: int = Field(0, ge=0, description="width of the time embedding; 0 = model.width")
    text_padding: Literal["masked", "seen"] = Field(
        "masked", description="whether tokens see what fills a caption up to text.max_tokens, as in Wan and CogVideoX"
    )
    text_embedding: Literal["mlp", "linear", "none"] = Field(
        "mlp", description="of the features to model.width; none: keys and values are made of them as they are"
    )
    num_refiner_layers: int = Field(
        0, ge=0, description="blocks of attention within the caption behind text_embedding=linear (HunyuanVideo: 2)"
    )
    activation: Literal["gelu", "gelu_tanh"] = Field("gelu", description="of the MLPs and of the text embedding")
    self_conditioning: float = Field(0.9, ge=0, le=1, description="probability of a second pass; 0 removes it")
    attention_backend: AttentionBackend = "sdpa"

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The named geometry of `PRESETS`, with fields changed. ValueError for a name it does not hold."""
        if name not in PRESETS:
            raise ValueError(f"no model preset {name!r}; use one of {' '.join(PRESETS)}")
        layers, width, heads, mlp, more = PRESETS[name]
        fields = {"num_layers": layers, "width": width, "num_heads": heads, "mlp_width": mlp, **more, **changes}
        return cls(**fields)

    @property
    def reads_text(self) -> bool:
        """Whether any caption reaches a token."""
        return self.cross_attention != "none" or self.pooled_text

    @property
    def embeds_text(self) -> bool:
        """Whether text features become as wide as the model before blocks read them."""
        return self.cross_attention != "none" and self.text_embedding != "none"

    def crosses(self, layer: int) -> bool:
        """Whether a block attends to text."""
        return self.cross_attention == "all" or (self.cross_attention == "per_frame" and self.window(layer)[0] == 1)

    @property
    def interleaves_text(self) -> bool:
        """Whether blocks attend to the tokens of both encoders in turn."""
        return self.cross_text == "interleaved"

    def reads_second(self, layer: int) -> bool:
        """Whether a block that attends to text attends to that of the second encoder."""
        return self.interleaves_text and layer % 2 == 0

    @property
    def patch_size(self) -> int:
        """Places of the latent in a token."""
        return math.prod(self.patch)

    def window(self, layer: int) -> AnyWindow:
        """The attention window of a block, as configured."""
        if min(layer, self.num_layers - 1 - layer) < self.full_ends:
            return 0, 0, 0
        return self.windows[layer % len(self.windows)]

    @property
    def is_joint(self) -> bool:
        """Whether text tokens are a stream of their own beside the video's."""
        return self.cross_attention == "joint"

    @property
    def time_layer(self) -> int | None:
        """The block before which sinusoids of time are added, where that is not the start."""
        if self.absolute_position != "space_then_time":
            return None
        spanning = (n for n in range(self.num_layers) if self.window(n)[0] != 1)
        return next(spanning, None)

    @property
    def spans_frames(self) -> bool:
        """Whether any attention goes across latent frames."""
        return self.full_ends > 0 or self.temporal_attention or any(window[0] != 1 for window in self.windows)

    @property
    def out_factor(self) -> int:
        """Output channels for each of the latent's."""
        return 2 if self.learned_variance else 1

    @property
    def num_double_layers(self) -> int:
        """The first blocks, those that are not single-stream."""
        return self.num_layers - self.num_single_layers

    @property
    def num_vectors(self) -> int:
        """Modulation vectors of a block that is not single-stream: six for each stream."""
        return 12 if self.is_joint else 6

    @property
    def cond_width(self) -> int:
        """Width of the time embedding."""
        return self.time_width or self.width

    @property
    def shares_modulation(self) -> bool:
        """Whether there is a modulation A_1 that all blocks start from."""
        return self.modulation == "table" or self.adaln_rank > 0

    def faults(self) -> Iterator[str]:
        return model_faults(self)


@overload
def whole_window(window: Window, grid: Window) -> Window: ...
@overload
def whole_window(window: AnyWindow, grid: Window) -> AnyWindow: ...
def whole_window(window: AnyWindow, grid: Window) -> AnyWindow:
    """Replace 0 (the whole axis) by the grid's size and clamp what is larger than the grid; one that skips stays."""
    if len(window) == 2:
        return window
    t, h, w = (min(size, axis) or axis for size, axis in zip(window, grid, strict=True))
    return t, h, w
