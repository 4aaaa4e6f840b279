"""CogVideoX text-to-video (2408.06072), 2B, 5B and 1.5: CogVideoXTransformer3DModel.

Rotation is by the places of the tokens, which is what its pipeline gives the class at the size that a checkpoint was
trained for; at others that crops and scales, and ours extrapolates.
"""

from collections.abc import Mapping
from typing import Any

from vidit.config import FAMILIES, Model
from vidit.export.diffusers.family import Family, Geometry, at, require_same_channels
from vidit.export.diffusers.forms import BY_NORM, CHANNELS_FIRST, KERNEL_OR_FLAT, PAIRS

FREE = ("patch", "text_padding", "relative_position", "absolute_position", "position_scale", "time_width")
MLP_RATIO = 4
TEMPORAL = 4  # pixel frames of a latent frame, by which its config counts


def _read(config: Mapping[str, Any]) -> Geometry:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    space, p = config["spatial_interpolation_scale"], config["patch_size"]
    patch = (config.get("patch_size_t") or 1, p, p)
    rope = config["use_rotary_positional_embeddings"]
    sinusoids = {
        "relative_position": "none",
        "absolute_position": "sincos",
        "position_scale": (config["temporal_interpolation_scale"], space, space),
    }
    fields = {**FAMILIES["cogvideox"], "patch": patch, "time_width": config["time_embed_dim"]}
    model = Model(
        **{**fields, **({} if rope else sinusoids)},
        num_layers=config["num_layers"],
        width=width,
        num_heads=config["num_attention_heads"],
        mlp_width=MLP_RATIO * width,
        time_frequencies=width,
    )
    require_same_channels(config)
    return Geometry(model, config["in_channels"], config["text_embed_dim"])


def _write(g: Geometry) -> dict[str, Any]:
    c = g.model
    rope, (time, height, width) = c.relative_position == "rope", c.position_scale
    kept = {
        "model.patch": (c.patch, (c.patch[0], c.patch[-1], c.patch[-1])),
        "model.mlp_width": (c.mlp_width, MLP_RATIO * c.width),
        "model.time_frequencies": (c.time_frequencies, c.width),
        "model.relative_position": (c.relative_position, "rope" if c.absolute_position == "none" else "none"),
        "model.absolute_position": (c.absolute_position, "none" if rope else "sincos"),
        "model.position_scale": (c.position_scale, (time, height, height)),
    }
    if odd := [f"{name}={found} where it has {wanted}" for name, (found, wanted) in kept.items() if found != wanted]:
        raise ValueError(f"CogVideoXTransformer3DModel cannot express this model: {'; '.join(odd)}")
    sizes: dict[str, Any] = {}
    if g.latent is not None:
        frames, high, wide = g.latent
        sizes = {"sample_frames": 1 + TEMPORAL * (frames - 1), "sample_height": high, "sample_width": wide}
    if g.text_tokens is not None:
        sizes["max_text_seq_length"] = g.text_tokens
    return {
        "patch_size": c.patch[-1], "patch_size_t": None if c.patch[0] == 1 else c.patch[0],
        "num_attention_heads": c.num_heads, "attention_head_dim": c.width // c.num_heads,
        "in_channels": g.channels, "out_channels": g.channels, "text_embed_dim": g.text_width,
        "num_layers": c.num_layers, "time_embed_dim": c.cond_width, "use_rotary_positional_embeddings": rope,
        **({} if rope else {"spatial_interpolation_scale": width, "temporal_interpolation_scale": time}),
        **sizes,
    }  # fmt: skip


COGVIDEOX = Family(
    name="cogvideox",
    cls="CogVideoXTransformer3DModel",
    fields={name: value for name, value in FAMILIES["cogvideox"].items() if name not in FREE},
    fixed={
        "flip_sin_to_cos": True, "freq_shift": 0, "ofs_embed_dim": None, "attention_bias": True,
        "activation_fn": "gelu-approximate", "timestep_activation_fn": "silu",
        "norm_elementwise_affine": True, "norm_eps": 1e-5, "use_learned_positional_embeddings": False,
        "temporal_compression_ratio": TEMPORAL,
    },
    read=_read,
    write=_write,
    layers=("transformer_blocks.{}",),
    outside={
        "embed.patch.project": at("patch_embed.proj", form=KERNEL_OR_FLAT),
        "embed.text.out": at("patch_embed.text_proj"),
        "embed.conditioning.time.up": at("time_embedding.linear_1"),
        "embed.conditioning.time.out": at("time_embedding.linear_2"),
        "head.final_norm": at("norm_final"),
        "head.norm": at("norm_out.norm"),
        "head.modulation": at("norm_out.linear"),
        "head.project": at("proj_out", form=CHANNELS_FIRST),
    },
    block={
        "modulation.up": at("norm1.linear", "norm2.linear", form=BY_NORM),
        "attn_norm": at("norm1.norm"),
        "mlp_norm": at("norm2.norm"),
        "attn.query": at("attn1.to_q", form=PAIRS),
        "attn.key": at("attn1.to_k", form=PAIRS),
        "attn.value": at("attn1.to_v"),
        "attn.out": at("attn1.to_out.0"),
        "attn.query_norm": at("attn1.norm_q", form=PAIRS),
        "attn.key_norm": at("attn1.norm_k", form=PAIRS),
        "mlp.up": at("ff.net.0.proj"),
        "mlp.down": at("ff.net.2"),
    },
)  # fmt: skip
