"""Published geometries by name, and the parts that make a model one of a family."""

from typing import Any

# Fields of `Model` that differ from W.A.L.T.'s, the default.
FAMILIES: dict[str, dict[str, Any]] = {
    "wan": {
        "patch": 2, "windows": ((0, 0, 0),), "image_attention": "frame", "relative_position": "rope",
        "rope_split": "third", "absolute_position": False, "qk_norm": "width", "cross_attention": "all",
        "cross_keys": "text", "cross_norm": "affine", "modulation": "table", "activation": "gelu_tanh",
        "text_padding": "seen", "self_conditioning": 0.0,
    },
    "cogvideox": {
        "patch": 2, "windows": ((0, 0, 0),), "image_attention": "frame", "relative_position": "rope",
        "absolute_position": False, "qk_norm": "head_affine", "norm_affine": True, "norm_eps": 1e-5,
        "cross_attention": "joint", "adaln_rank": 0, "time_width": 512, "text_embedding": "linear",
        "text_padding": "seen", "activation": "gelu_tanh", "self_conditioning": 0.0,
    },
    "latte": {
        "patch": 2, "windows": ((1, 0, 0), (0, 1, 1)), "image_attention": "frame", "relative_position": "none",
        "absolute_position": "space_then_time", "position_span": 32, "qk_norm": "none", "cross_attention": "per_frame",
        "cross_keys": "text", "cross_norm": "none", "modulation": "table", "activation": "gelu_tanh",
        "self_conditioning": 0.0,
    },
    "stdit3": {
        "patch": 2, "windows": ((1, 0, 0), (0, 1, 1)), "image_attention": "frame", "relative_position": "rope",
        "rope_split": "time", "absolute_position": "space", "qk_norm": "head_rms", "cross_attention": "all",
        "cross_keys": "text", "cross_norm": "none", "modulation": "table", "activation": "gelu_tanh",
        "self_conditioning": 0.0,
    },
    "gentron": {
        "patch": 2, "windows": ((1, 0, 0),), "temporal_attention": True, "relative_position": "rope",
        "rope_split": "time", "absolute_position": "space", "qk_norm": "none", "cross_attention": "all",
        "cross_keys": "text", "pooled_text": True, "adaln_rank": 0, "activation": "gelu_tanh",
        "self_conditioning": 0.0,
    },
    "opensora_plan": {
        "patch": 2, "windows": (("single", 4), ("group", 4)), "full_ends": 1, "image_attention": "frame",
        "relative_position": "rope", "rope_split": "third", "absolute_position": False, "qk_norm": "none",
        "cross_attention": "all", "cross_keys": "text", "cross_norm": "none", "modulation": "table",
        "activation": "gelu_tanh", "self_conditioning": 0.0,
    },
    "hunyuanvideo": {
        "num_single_layers": 2, "patch": 2, "windows": ((0, 0, 0),), "image_attention": "frame",
        "relative_position": "rope", "rope_split": "eighth", "rope_theta": 256.0, "absolute_position": False,
        "qk_norm": "head_rms", "cross_attention": "joint", "text_weights": "own", "pooled_text": True,
        "pooled_embedding": "mlp", "guidance": 6.0, "adaln_rank": 0, "text_embedding": "linear",
        "num_refiner_layers": 2, "activation": "gelu_tanh", "self_conditioning": 0.0,
    },
    "flux": {
        "num_single_layers": 2, "patch": 2, "windows": ((0, 0, 0),), "image_attention": "frame",
        "relative_position": "rope", "rope_split": "eighth", "absolute_position": False, "qk_norm": "head_rms",
        "cross_attention": "joint", "text_weights": "own", "pooled_text": True, "pooled_embedding": "mlp",
        "adaln_rank": 0, "text_embedding": "linear", "text_padding": "seen", "activation": "gelu_tanh",
        "self_conditioning": 0.0,
    },
}  # fmt: skip

# layers, width, heads, MLP width, changes. S, B, L, XL are the DiT ladder (papers.md 0b) with W.A.L.T.'s
# blocks; L and XL are its UCF models (313M, 460M), SR1 and SR2 its super-resolution stages (1.3B, 419M).
# 3B takes 9216, printed as the hidden size, for the MLP width: the width itself is unpublished.
# Wan 2.1's text-to-video models are those of 2503.20314, table 1; CogVideoX's (2408.06072) those of its checkpoints, in
# which 2B has 30 heads, not 32; Latte's (2401.03048) is that of Latte-1, text to 16 frames. HunyuanVideo's (2412.03603)
# is the distilled text-to-video model, 20 blocks of two streams and 40 of one; Open-Sora 2.0's (2503.09642) has FLUX's
# 19 and 38.
# GenTron's (2312.04557) XL/2 and G/2 have unpublished heads, taken to be 16, and places in time, here a rotation.
# Open-Sora 1.2 is STDiT3-XL/2: 28 spatial and 28 temporal blocks in turn; Open-Sora-Plan 1.3 (2412.00131) is its 2.7B.
# COG_2B: sinusoids instead of rotation, space scaled to its first resolution.
COG_2B: dict[str, Any] = {
    **FAMILIES["cogvideox"], "relative_position": "none", "absolute_position": "sincos",
    "position_scale": (1.0, 1.875, 1.875), "time_frequencies": 1920,
}  # fmt: skip
# DiT-XL/2 (2212.09748) without its labels: a model of images, each frame by itself, and so not among the families.
DIT: dict[str, Any] = {
    "patch": 2, "windows": ((1, 0, 0),), "relative_position": "none", "absolute_position": "space", "qk_norm": "none",
    "cross_attention": "none", "adaln_rank": 0, "activation": "gelu_tanh", "self_conditioning": 0.0,
}  # fmt: skip
# GenTron: CLIP's tokens in even blocks, T5's in odd ones, keys and values straight from both.
TWO_TEXTS: dict[str, Any] = {"cross_text": "interleaved", "text_embedding": "none", "pooled_width": 768}
PRESETS: dict[str, tuple[int, int, int, int, dict[str, Any]]] = {
    "demo": (4, 128, 4, 512, {"relative_position": "rope", "self_conditioning": 0.0, "pooled_text": True}),
    "S": (12, 384, 6, 1536, {}),
    "B": (12, 768, 12, 3072, {}),
    "L": (24, 1024, 16, 4096, {}),
    "XL": (28, 1152, 16, 4608, {}),
    "SR1": (40, 1408, 16, 6144, {"cross_attention": "all", "patch": 2}),
    "SR2": (24, 1024, 16, 4096, {"cross_attention": "all", "patch": 4}),
    "3B": (52, 1792, 16, 9216, {"cross_attention": "all"}),
    "7B": (32, 3584, 28, 14336, {"cross_attention": "all"}),
    "dit-XL-2": (28, 1152, 16, 4608, {**DIT, "learned_variance": True}),
    "wan-1.3B": (30, 1536, 12, 8960, FAMILIES["wan"]),
    "wan-14B": (40, 5120, 40, 13824, FAMILIES["wan"]),
    "cogvideox-2B": (30, 1920, 30, 7680, COG_2B),
    "cogvideox-5B": (42, 3072, 48, 12288, {**FAMILIES["cogvideox"], "time_frequencies": 3072}),
    "cogvideox-1.5-5B": (42, 3072, 48, 12288, {**FAMILIES["cogvideox"], "patch": (2, 2, 2), "time_frequencies": 3072}),
    "hunyuanvideo": (60, 3072, 24, 12288, {**FAMILIES["hunyuanvideo"], "num_single_layers": 40, "pooled_width": 768}),
    "opensora-2": (57, 3072, 24, 12288, {**FAMILIES["flux"], "num_single_layers": 38, "pooled_width": 768}),
    "latte-1": (56, 1152, 16, 4608, {**FAMILIES["latte"], "learned_variance": True}),
    "gentron-XL": (28, 1152, 16, 4608, {**FAMILIES["gentron"], **TWO_TEXTS}),
    "gentron-G": (48, 1664, 16, 6656, {**FAMILIES["gentron"], **TWO_TEXTS}),
    "opensora-plan-1.3": (32, 2304, 24, 9216, {**FAMILIES["opensora_plan"], "full_ends": 2}),
    "opensora-1.2": (56, 1152, 16, 4608, {**FAMILIES["stdit3"], "learned_variance": True, "frame_rate": True}),
}
