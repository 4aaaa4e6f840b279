"""Wan 2.1 text-to-video (2503.20314): WanTransformer3DModel."""

from collections.abc import Mapping
from typing import Any

from vidit.config import FAMILIES, Model
from vidit.export.diffusers.family import Family, Geometry, at, require_same_channels
from vidit.export.diffusers.forms import BATCHED, KERNEL_3D, PAIRS

FREE = ("patch", "text_padding", "cross_norm")


def _read(config: Mapping[str, Any]) -> Geometry:
    model = Model(
        **{
            **FAMILIES["wan"],
            "patch": config["patch_size"],
            "cross_norm": "affine" if config["cross_attn_norm"] else "none",
        },
        num_layers=config["num_layers"],
        width=config["num_attention_heads"] * config["attention_head_dim"],
        num_heads=config["num_attention_heads"],
        mlp_width=config["ffn_dim"],
    )
    require_same_channels(config)
    return Geometry(model, config["in_channels"], config["text_dim"])


def _write(g: Geometry) -> dict[str, Any]:
    c = g.model
    if c.cross_norm == "bare":
        raise ValueError("model.cross_norm=bare has no place in WanTransformer3DModel; it knows affine and none")
    return {
        "patch_size": list(c.patch), "num_attention_heads": c.num_heads,
        "attention_head_dim": c.width // c.num_heads, "in_channels": g.channels, "out_channels": g.channels,
        "text_dim": g.text_width, "ffn_dim": c.mlp_width, "num_layers": c.num_layers,
        "cross_attn_norm": c.cross_norm == "affine",
    }  # fmt: skip


WAN = Family(
    name="wan",
    cls="WanTransformer3DModel",
    fields={name: value for name, value in FAMILIES["wan"].items() if name not in FREE},
    fixed={
        "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "freq_dim": 256, "image_dim": None,
        "added_kv_proj_dim": None, "pos_embed_seq_len": None,
    },
    read=_read,
    write=_write,
    layers=("blocks.{}",),
    outside={
        "embed.patch.project": at("patch_embedding", form=KERNEL_3D),
        "embed.conditioning.time.up": at("condition_embedder.time_embedder.linear_1"),
        "embed.conditioning.time.out": at("condition_embedder.time_embedder.linear_2"),
        "embed.conditioning.shared": at("condition_embedder.time_proj"),
        "embed.text.up": at("condition_embedder.text_embedder.linear_1"),
        "embed.text.out": at("condition_embedder.text_embedder.linear_2"),
        "head.modulation.table": at("scale_shift_table", form=BATCHED),
        "head.project": at("proj_out"),
    },
    block={
        "modulation.table": at("scale_shift_table", form=BATCHED),
        "attn.query": at("attn1.to_q", form=PAIRS),
        "attn.key": at("attn1.to_k", form=PAIRS),
        "attn.value": at("attn1.to_v"),
        "attn.out": at("attn1.to_out.0"),
        "attn.query_norm": at("attn1.norm_q", form=PAIRS),
        "attn.key_norm": at("attn1.norm_k", form=PAIRS),
        "cross.query": at("attn2.to_q"),
        "cross.key": at("attn2.to_k"),
        "cross.value": at("attn2.to_v"),
        "cross.out": at("attn2.to_out.0"),
        "cross.query_norm": at("attn2.norm_q"),
        "cross.key_norm": at("attn2.norm_k"),
        "cross_norm": at("norm2"),
        "mlp.up": at("ffn.net.0.proj"),
        "mlp.down": at("ffn.net.2"),
    },
)  # fmt: skip
