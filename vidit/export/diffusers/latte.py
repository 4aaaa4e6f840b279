"""Latte text-to-video (2401.03048): LatteTransformer3DModel, whose spatial and temporal blocks are ours in turn."""

from collections.abc import Mapping
from typing import Any

from vidit.config import FAMILIES, Model
from vidit.export.diffusers.family import Family, Geometry, at
from vidit.export.diffusers.forms import KERNEL_2D

FREE = ("patch", "text_padding", "position_span")
MLP_RATIO = 4
# Latents from this size on have their sinusoids scaled down.
SCALED_FROM = 64


def _scale(sample_size: int) -> float:
    return float(max(sample_size // SCALED_FROM, 1))


def _read(config: Mapping[str, Any]) -> Geometry:
    width, size = config["num_attention_heads"] * config["attention_head_dim"], config["sample_size"]
    channels, out = config["in_channels"], config["out_channels"] or config["in_channels"]
    if out not in (channels, 2 * channels):
        raise ValueError(
            f"{channels} channels in and {out} out; only as many out, or twice that with a variance, are read"
        )
    if config["cross_attention_dim"] != width:
        raise ValueError(
            f"cross_attention_dim={config['cross_attention_dim']} is not the width {width}, as it is in Latte"
        )
    model = Model(
        **{**FAMILIES["latte"], "patch": config["patch_size"], "position_span": size // config["patch_size"]},
        num_layers=2 * config["num_layers"],
        width=width,
        num_heads=config["num_attention_heads"],
        mlp_width=MLP_RATIO * width,
        position_scale=(1.0, _scale(size), _scale(size)),
        learned_variance=out == 2 * channels,
    )
    return Geometry(model, channels, config["caption_channels"])


def _write(g: Geometry) -> dict[str, Any]:
    c = g.model
    size = c.position_span * c.patch[-1]
    kept = {
        "model.patch": (c.patch, (1, c.patch[-1], c.patch[-1])),
        "model.num_layers": (c.num_layers, c.num_layers // 2 * 2),
        "model.mlp_width": (c.mlp_width, MLP_RATIO * c.width),
        "model.position_span": (c.position_span, c.position_span or "the size of training"),
        "model.position_scale": (c.position_scale, (1.0, _scale(size), _scale(size))),
    }
    if odd := [f"{name}={found} where it has {wanted}" for name, (found, wanted) in kept.items() if found != wanted]:
        raise ValueError(f"LatteTransformer3DModel cannot express this model: {'; '.join(odd)}")
    return {
        "patch_size": c.patch[-1], "num_attention_heads": c.num_heads, "attention_head_dim": c.width // c.num_heads,
        "in_channels": g.channels, "out_channels": g.channels * c.out_factor, "caption_channels": g.text_width,
        "num_layers": c.num_layers // 2, "cross_attention_dim": c.width, "sample_size": size,
        **({} if g.latent is None else {"video_length": g.latent[0]}),
    }  # fmt: skip


LATTE = Family(
    name="latte",
    cls="LatteTransformer3DModel",
    fields={name: value for name, value in FAMILIES["latte"].items() if name not in FREE},
    fixed={
        "attention_bias": True, "dropout": 0.0, "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False, "norm_eps": 1e-6,
    },
    read=_read,
    write=_write,
    layers=("transformer_blocks.{}", "temporal_transformer_blocks.{}"),
    outside={
        "embed.patch.project": at("pos_embed.proj", form=KERNEL_2D),
        "embed.conditioning.time.up": at("adaln_single.emb.timestep_embedder.linear_1"),
        "embed.conditioning.time.out": at("adaln_single.emb.timestep_embedder.linear_2"),
        "embed.conditioning.shared": at("adaln_single.linear"),
        "embed.text.up": at("caption_projection.linear_1"),
        "embed.text.out": at("caption_projection.linear_2"),
        "head.modulation.table": at("scale_shift_table"),
        "head.project": at("proj_out"),
    },
    block={
        "modulation.table": at("scale_shift_table"),
        "attn.query": at("attn1.to_q"),
        "attn.key": at("attn1.to_k"),
        "attn.value": at("attn1.to_v"),
        "attn.out": at("attn1.to_out.0"),
        "cross.query": at("attn2.to_q"),
        "cross.key": at("attn2.to_k"),
        "cross.value": at("attn2.to_v"),
        "cross.out": at("attn2.to_out.0"),
        "mlp.up": at("ff.net.0.proj"),
        "mlp.down": at("ff.net.2"),
    },
)  # fmt: skip
