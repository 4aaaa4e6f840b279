"""The diffusion transformer, and its named sizes."""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, overload

from pydantic import BeforeValidator, Discriminator, Field, PositiveFloat, Tag

from vidit.config.presets import PRESETS
from vidit.config.section import Positive, Section
from vidit.config.text_faults import text_faults

Window = tuple[int, int, int]
Skip = tuple[Literal["single", "group"], Positive]
AnyWindow = Window | Skip
"""Three numbers, or a pair that skips."""

# RoPE turns pairs of a head's dims, at least one pair for each of time, height and width.
MIN_ROPE_HEAD_DIM = 6
# Every token of a clip is to attend to all of it.
MIN_SKIP = 2


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
    attention_backend: Literal["auto", "sdpa", "flash"] = "auto"

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

    def reads_second(self, layer: int) -> bool:
        """Whether a block that attends to text attends to that of the second encoder."""
        return self.cross_text == "interleaved" and layer % 2 == 0

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
    def _spans_frames(self) -> bool:
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
        if self.width % self.num_heads:
            legal = " ".join(str(n) for n in range(1, 65) if self.width % n == 0)
            yield f"model.width={self.width} is not divisible by model.num_heads={self.num_heads}; use one of {legal}"
        elif self.relative_position == "rope":
            head_dim = self.width // self.num_heads
            if head_dim % 2 or head_dim < MIN_ROPE_HEAD_DIM:
                yield (
                    f"model.relative_position=rope needs an even head dim of at least {MIN_ROPE_HEAD_DIM}, not "
                    f"{head_dim} ({self.width} / {self.num_heads} heads); change model.num_heads or model.width"
                )
        if self.absolute_position == "space_then_time" and self.time_layer is None:
            yield (
                f"model.absolute_position=space_then_time, but none of model.windows={self.windows} spans latent "
                "frames; add such a window, or use absolute_position=learned"
            )
        if self.absolute_position == "space" and self.position_scale[0] != 1:
            yield (
                f"model.position_scale={list(self.position_scale)} scales time by {self.position_scale[0]:g}, which "
                "model.absolute_position=space does not have; begin it with 1"
            )
        if self.absolute_position in ("sincos", "space", "space_then_time") and self.width % 16:
            yield (
                f"model.absolute_position={self.absolute_position} needs a model.width divisible by 16, not "
                f"{self.width}; use {self.width // 16 * 16 or 16} or {(self.width // 16 + 1) * 16}"
            )
        if self.time_width not in (0, self.width) and self.shares_modulation:
            yield (
                f"model.time_width={self.time_width} is not model.width={self.width}, which a modulation of the whole "
                "model (adaln_rank above 0, modulation=table) needs; use time_width=0, or adaln_rank=0"
            )
        yield from text_faults(self)
        if self.is_joint:
            yield from self._joint_faults()
        yield from self._stream_faults()
        if self.temporal_attention and self.relative_position == "bias":
            yield "model.temporal_attention=true takes no position bias; set model.relative_position=rope or none"
        if self.frame_times and self.num_refiner_layers:
            yield (
                f"model.frame_times=true gives no time to a whole caption, which model.num_refiner_layers="
                f"{self.num_refiner_layers} needs; use num_refiner_layers=0, or given_channels instead of frame_times"
            )
        if self.frame_times and self.patch[0] > 1:
            yield (
                f"model.frame_times=true gives a time to each latent frame, but model.patch={list(self.patch)} puts "
                f"{self.patch[0]} of them into a token; use a patch of one frame"
            )
        if self.rope_split == "time" and self.relative_position == "rope" and not self._spans_frames:
            yield (
                f"model.rope_split=time turns by time alone, but none of model.windows={self.windows} spans latent "
                "frames; add such a window or temporal_attention, or use rope_split=third"
            )
        if any(size < 0 for window in self.windows if len(window) == 3 for size in window):
            yield f"model.windows={self.windows} holds a negative size; use 0 for the whole axis"
        yield from self._skip_faults()
        if self.attention_backend == "flash" and self.relative_position == "bias":
            yield "model.attention_backend=flash takes no position bias; set model.relative_position=rope"
        if (
            self.attention_backend == "flash"
            and self.cross_attention in ("per_frame", "all")
            and self.cross_keys != "text"
        ):
            yield "model.attention_backend=flash takes no mask over text keys; set model.cross_keys=text"
        if self.cross_attention == "per_frame" and all(self.window(n)[0] != 1 for n in range(self.num_layers)):
            yield (
                f"model.cross_attention=per_frame, but no block's of model.windows={self.windows} is one latent frame "
                "(1, h, w): no block would see the text; use cross_attention=all or none, or add such a window"
            )

    def _skip_faults(self) -> Iterator[str]:
        """What windows through the whole clip exclude."""
        skips = [window for window in self.windows if len(window) == 2]
        if any(k < MIN_SKIP for _, k in skips):
            yield f"model.windows={self.windows} skips by 1, which is to attend to all; use (0, 0, 0), or k above 1"
        if skips and self.relative_position == "bias":
            yield (
                "model.relative_position=bias has an entry for each offset in a window, and tokens of one that skips "
                f"lie anywhere (model.windows={self.windows}); use rope or none"
            )
        if 2 * self.full_ends >= self.num_layers or (self.full_ends and set(self.windows) == {(0, 0, 0)}):
            yield (
                f"model.full_ends={self.full_ends} with model.num_layers={self.num_layers} and model.windows="
                f"{self.windows}: all blocks attend to all tokens; use windows=[[0,0,0]] and full_ends=0, or full_ends "
                f"of at most {(self.num_layers - 1) // 2} beside other windows"
            )

    def _joint_faults(self) -> Iterator[str]:
        """What text tokens in self-attention exclude."""
        if self.temporal_attention:
            yield (
                "model.temporal_attention=true is of the video's tokens alone, not of the text's beside them (model."
                "cross_attention=joint); leave it out, or use cross_attention=all"
            )
        if self.full_ends or any(any(window) for window in self.windows):
            yield (
                f"model.cross_attention=joint attends to all tokens of a clip, but model.windows={self.windows} has "
                "windows; use windows=[[0,0,0]], or cross_attention=all"
            )
        if self.relative_position == "bias":
            yield "model.cross_attention=joint takes no position bias; set model.relative_position=rope or none"
        if self.frame_times:
            yield (
                "model.frame_times=true modulates the tokens of each latent frame, and the text's are of none "
                "(model.cross_attention=joint); leave it out, or use cross_attention=all"
            )
        if self.image_attention != "frame":
            yield (
                "model.cross_attention=joint cannot let images pass unchanged, since their text would not; set "
                "model.image_attention=frame"
            )
        if self.attention_backend == "flash" and self.text_padding == "masked":
            yield "model.attention_backend=flash takes no mask over text; use auto or sdpa with cross_attention=joint"

    def _stream_faults(self) -> Iterator[str]:
        """What single-stream blocks and weights of the text's own exclude."""
        own, single = self.text_weights == "own", self.num_single_layers
        given = {"model.text_weights=own": own, f"model.num_single_layers={single}": single > 0}
        told = [name for name, is_set in given.items() if is_set]
        if told and not self.is_joint:
            yield f"{' and '.join(told)} treat text as tokens beside the video's; set model.cross_attention=joint"
        if single > self.num_layers or (own and single == self.num_layers):
            least = "fewer than" if own else "at most"
            yield (
                f"model.num_single_layers={single} of model.num_layers={self.num_layers}: use {least} {self.num_layers}"
                + (", since text_weights=own is for the other blocks" if own else "")
            )
        if own and not single:
            yield (
                "model.text_weights=own without single-stream blocks: the last block's weights for text would reach no "
                "output; set model.num_single_layers to at least 1"
            )
        if single and self.shares_modulation:
            yield (
                f"model.num_single_layers={single}: such a block has other modulation vectors than the rest, so "
                "none are for all; set model.modulation=projected and model.adaln_rank=0"
            )
        if own and self.norm_affine:
            yield "model.text_weights=own has no norms with scale and shift for the text; set model.norm_affine=false"


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
