"""What in the section `model` contradicts itself: one line for each fault, with its cure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vidit.config.model import Model

# RoPE turns pairs of a head's dims, at least one pair for each of time, height and width.
MIN_ROPE_HEAD_DIM = 6
# Every token of a clip is to attend to all of it.
MIN_SKIP = 2


def model_faults(c: Model) -> Iterator[str]:
    """All of them."""
    yield from _width_faults(c)
    yield from _position_faults(c)
    yield from _window_faults(c)
    yield from _time_faults(c)
    yield from _text_faults(c)
    if c.is_joint:
        yield from _joint_faults(c)
    yield from _stream_faults(c)
    yield from _kernel_faults(c)


def _width_faults(c: Model) -> Iterator[str]:
    """Of the model, of a head, and of the time embedding."""
    if c.width % c.num_heads:
        legal = " ".join(str(n) for n in range(1, 65) if c.width % n == 0)
        yield f"model.width={c.width} is not divisible by model.num_heads={c.num_heads}; use one of {legal}"
    elif c.relative_position == "rope":
        head_dim = c.width // c.num_heads
        if head_dim % 2 or head_dim < MIN_ROPE_HEAD_DIM:
            yield (
                f"model.relative_position=rope needs an even head dim of at least {MIN_ROPE_HEAD_DIM}, not "
                f"{head_dim} ({c.width} / {c.num_heads} heads); change model.num_heads or model.width"
            )
    if c.time_width not in (0, c.width) and c.shares_modulation:
        yield (
            f"model.time_width={c.time_width} is not model.width={c.width}, which a modulation of the whole "
            "model (adaln_rank above 0, modulation=table) needs; use time_width=0, or adaln_rank=0"
        )


def _position_faults(c: Model) -> Iterator[str]:
    """Of absolute positions, and of angles of time alone."""
    if c.absolute_position == "space_then_time" and c.time_layer is None:
        yield (
            f"model.absolute_position=space_then_time, but none of model.windows={c.windows} spans latent "
            "frames; add such a window, or use absolute_position=learned"
        )
    if c.absolute_position == "space" and c.position_scale[0] != 1:
        yield (
            f"model.position_scale={list(c.position_scale)} scales time by {c.position_scale[0]:g}, which "
            "model.absolute_position=space does not have; begin it with 1"
        )
    if c.absolute_position in ("sincos", "space", "space_then_time") and c.width % 16:
        yield (
            f"model.absolute_position={c.absolute_position} needs a model.width divisible by 16, not "
            f"{c.width}; use {c.width // 16 * 16 or 16} or {(c.width // 16 + 1) * 16}"
        )
    if c.rope_split == "time" and c.relative_position == "rope" and not c.spans_frames:
        yield (
            f"model.rope_split=time turns by time alone, but none of model.windows={c.windows} spans latent "
            "frames; add such a window or temporal_attention, or use rope_split=third"
        )


def _window_faults(c: Model) -> Iterator[str]:
    """What is no window, and what windows through the whole clip exclude."""
    if any(size < 0 for window in c.windows if len(window) == 3 for size in window):
        yield f"model.windows={c.windows} holds a negative size; use 0 for the whole axis"
    skips = [window for window in c.windows if len(window) == 2]
    if any(k < MIN_SKIP for _, k in skips):
        yield f"model.windows={c.windows} skips by 1, which is to attend to all; use (0, 0, 0), or k above 1"
    if skips and c.relative_position == "bias":
        yield (
            "model.relative_position=bias has an entry for each offset in a window, and tokens of one that skips "
            f"lie anywhere (model.windows={c.windows}); use rope or none"
        )
    if 2 * c.full_ends >= c.num_layers or (c.full_ends and set(c.windows) == {(0, 0, 0)}):
        yield (
            f"model.full_ends={c.full_ends} with model.num_layers={c.num_layers} and model.windows="
            f"{c.windows}: all blocks attend to all tokens; use windows=[[0,0,0]] and full_ends=0, or full_ends "
            f"of at most {(c.num_layers - 1) // 2} beside other windows"
        )


def _time_faults(c: Model) -> Iterator[str]:
    """Of attention through time, and of a time for each frame."""
    if c.temporal_attention and c.relative_position == "bias":
        yield "model.temporal_attention=true takes no position bias; set model.relative_position=rope or none"
    if c.frame_times and c.num_refiner_layers:
        yield (
            f"model.frame_times=true gives no time to a whole caption, which model.num_refiner_layers="
            f"{c.num_refiner_layers} needs; use num_refiner_layers=0, or given_channels instead of frame_times"
        )
    if c.frame_times and c.patch[0] > 1:
        yield (
            f"model.frame_times=true gives a time to each latent frame, but model.patch={list(c.patch)} puts "
            f"{c.patch[0]} of them into a token; use a patch of one frame"
        )


def _text_faults(c: Model) -> Iterator[str]:
    """Parts for text that exclude each other, one line each."""
    if c.text_padding == "seen" and c.cross_attention in ("per_frame", "all") and c.cross_keys != "text":
        yield "model.text_padding=seen is for text alone among the keys; set model.cross_keys=text"
    if c.num_refiner_layers and c.text_embedding != "linear":
        yield (
            f"model.num_refiner_layers={c.num_refiner_layers} refines what text_embedding=linear gives, not "
            f"{c.text_embedding}; set that, or num_refiner_layers=0"
        )
    if c.text_embedding == "none" and (c.is_joint or (c.cross_attention != "none" and c.cross_keys != "text")):
        yield (
            "model.text_embedding=none leaves text features as wide as their encoder makes them, but the same "
            "projections are for video tokens; set model.cross_attention=all, model.cross_keys=text"
        )
    parities = {layer % 2 for layer in range(c.num_layers) if c.crosses(layer)}
    if c.interleaves_text and len(parities) == 1:
        yield (
            f"model.cross_text=interleaved, but only {'odd' if 1 in parities else 'even'} blocks attend to text (model."
            f"num_layers={c.num_layers}, windows={c.windows}): one encoder would not be read; use cross_attention=all "
            "and at least 2 layers, or cross_text=first"
        )
    if c.cross_attention == "per_frame" and all(c.window(n)[0] != 1 for n in range(c.num_layers)):
        yield (
            f"model.cross_attention=per_frame, but no block's of model.windows={c.windows} is one latent frame "
            "(1, h, w): no block would see the text; use cross_attention=all or none, or add such a window"
        )


def _joint_faults(c: Model) -> Iterator[str]:
    """What text tokens in self-attention exclude."""
    if c.temporal_attention:
        yield (
            "model.temporal_attention=true is of the video's tokens alone, not of the text's beside them (model."
            "cross_attention=joint); leave it out, or use cross_attention=all"
        )
    if c.full_ends or any(any(window) for window in c.windows):
        yield (
            f"model.cross_attention=joint attends to all tokens of a clip, but model.windows={c.windows} has "
            "windows; use windows=[[0,0,0]], or cross_attention=all"
        )
    if c.relative_position == "bias":
        yield "model.cross_attention=joint takes no position bias; set model.relative_position=rope or none"
    if c.frame_times:
        yield (
            "model.frame_times=true modulates the tokens of each latent frame, and the text's are of none "
            "(model.cross_attention=joint); leave it out, or use cross_attention=all"
        )
    if c.image_attention != "frame":
        yield (
            "model.cross_attention=joint cannot let images pass unchanged, since their text would not; set "
            "model.image_attention=frame"
        )
    if c.attention_backend == "flash" and c.text_padding == "masked":
        yield "model.attention_backend=flash takes no mask over text; use sdpa with cross_attention=joint"


def _stream_faults(c: Model) -> Iterator[str]:
    """What single-stream blocks and weights of the text's own exclude."""
    own, single = c.text_weights == "own", c.num_single_layers
    given = {"model.text_weights=own": own, f"model.num_single_layers={single}": single > 0}
    told = [name for name, is_set in given.items() if is_set]
    if told and not c.is_joint:
        yield f"{' and '.join(told)} treat text as tokens beside the video's; set model.cross_attention=joint"
    if single > c.num_layers or (own and single == c.num_layers):
        least = "fewer than" if own else "at most"
        yield (
            f"model.num_single_layers={single} of model.num_layers={c.num_layers}: use {least} {c.num_layers}"
            + (", since text_weights=own is for the other blocks" if own else "")
        )
    if own and not single:
        yield (
            "model.text_weights=own without single-stream blocks: the last block's weights for text would reach no "
            "output; set model.num_single_layers to at least 1"
        )
    if single and c.shares_modulation:
        yield (
            f"model.num_single_layers={single}: such a block has other modulation vectors than the rest, so "
            "none are for all; set model.modulation=projected and model.adaln_rank=0"
        )
    if own and c.norm_affine:
        yield "model.text_weights=own has no norms with scale and shift for the text; set model.norm_affine=false"


def _kernel_faults(c: Model) -> Iterator[str]:
    """What flash-attn does not take."""
    if c.attention_backend == "flash" and c.relative_position == "bias":
        yield "model.attention_backend=flash takes no position bias; set model.relative_position=rope"
    if c.attention_backend == "flash" and c.cross_attention in ("per_frame", "all") and c.cross_keys != "text":
        yield "model.attention_backend=flash takes no mask over text keys; set model.cross_keys=text"
