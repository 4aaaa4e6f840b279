"""HunyuanVideo text-to-video (2412.03603): HunyuanVideoTransformer3DModel.

Its pipeline tells a distilled model its guidance scale at every call; ours holds it as `model.guidance`, 6 as there.
"""

from collections.abc import Mapping
from typing import Any, get_args

from vidit.config import FAMILIES, Model
from vidit.export.diffusers.family import Family, Geometry, Place, at, require_same_channels
from vidit.export.diffusers.forms import (
    CHANNELS_FIRST,
    FIRST_COLUMNS,
    KERNEL_3D,
    LAST_COLUMNS,
    PAIRS,
    SCALE_FIRST,
    STREAMS,
)
from vidit.model.rope import Split, axis_pairs

FREE = (
    "patch", "rope_split", "rope_theta", "num_single_layers", "num_refiner_layers", "pooled_width", "guidance",
    "text_padding",
)  # fmt: skip
GUIDANCE = 6.0


def _axes(head_dim: int, split: Split) -> tuple[int, ...]:
    return tuple(2 * pairs for pairs in axis_pairs(head_dim, split))


def _read(config: Mapping[str, Any]) -> Geometry:
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    axes, p = tuple(config["rope_axes_dim"]), config["patch_size"]
    splits = [split for split in get_args(Split) if _axes(head_dim, split) == axes]
    if not splits:
        known = " ".join(str(list(_axes(head_dim, split))) for split in get_args(Split))
        raise ValueError(f"rope_axes_dim={list(axes)} of heads of {head_dim} is none of those known here: {known}")
    model = Model(
        **{
            **FAMILIES["hunyuanvideo"],
            "patch": (config["patch_size_t"], p, p),
            "rope_split": "eighth" if "eighth" in splits else splits[0],
            "rope_theta": config["rope_theta"],
            "num_single_layers": config["num_single_layers"],
            "num_refiner_layers": config["num_refiner_layers"],
            "pooled_width": config["pooled_projection_dim"],
            "guidance": GUIDANCE if config["guidance_embeds"] else 0.0,
        },
        num_layers=config["num_layers"] + config["num_single_layers"],
        width=heads * head_dim,
        num_heads=heads,
        mlp_width=int(heads * head_dim * config["mlp_ratio"]),
    )
    require_same_channels(config)
    return Geometry(model, config["in_channels"], config["text_embed_dim"])


def _write(g: Geometry) -> dict[str, Any]:
    c = g.model
    head_dim = c.width // c.num_heads
    kept = {
        "model.patch": (c.patch, (c.patch[0], c.patch[-1], c.patch[-1])),
        "model.num_refiner_layers": (c.num_refiner_layers, c.num_refiner_layers or "at least 1"),
        "model.mlp_width": (c.mlp_width, int(c.width * (c.mlp_width / c.width))),
    }
    if odd := [f"{name}={found} where it has {wanted}" for name, (found, wanted) in kept.items() if found != wanted]:
        raise ValueError(f"HunyuanVideoTransformer3DModel cannot express this model: {'; '.join(odd)}")
    return {
        "patch_size": c.patch[-1], "patch_size_t": c.patch[0], "num_attention_heads": c.num_heads,
        "attention_head_dim": head_dim, "in_channels": g.channels, "out_channels": g.channels,
        "num_layers": c.num_double_layers, "num_single_layers": c.num_single_layers,
        "num_refiner_layers": c.num_refiner_layers, "mlp_ratio": c.mlp_width / c.width,
        "guidance_embeds": c.guidance > 0, "text_embed_dim": g.text_width,
        "pooled_projection_dim": c.pooled_width or g.text_width, "rope_theta": c.rope_theta,
        "rope_axes_dim": list(_axes(head_dim, c.rope_split)),
    }  # fmt: skip


def _vector(ours: str, theirs: str) -> dict[str, Place]:
    """Two layers."""
    return {f"{ours}.up": at(f"{theirs}.linear_1"), f"{ours}.out": at(f"{theirs}.linear_2")}


VECTORS = "time_text_embed"
REFINER = "context_embedder"
# Of a refiner's block, whose number stands in the middle of its name.
REFINED = {
    "attn_norm": "norm1", "query": "attn.to_q", "key": "attn.to_k", "value": "attn.to_v", "out": "attn.to_out.0",
    "mlp_norm": "norm2", "up": "ff.net.0.proj", "down": "ff.net.2", "modulation": "norm_out.linear",
}  # fmt: skip

HUNYUANVIDEO = Family(
    name="hunyuanvideo",
    cls="HunyuanVideoTransformer3DModel",
    fields={name: value for name, value in FAMILIES["hunyuanvideo"].items() if name not in FREE}
    | {"num_single_layers": 1},
    free=FREE,
    fixed={"qk_norm": "rms_norm", "image_condition_type": None},
    read=_read,
    write=_write,
    layers=("transformer_blocks.{}",),
    outside={
        "embed.patch.project": at("x_embedder.proj", form=KERNEL_3D),
        **_vector("embed.conditioning.time", f"{VECTORS}.timestep_embedder"),
        **_vector("embed.conditioning.guidance", f"{VECTORS}.guidance_embedder"),
        **_vector("embed.conditioning.pooled", f"{VECTORS}.text_embedder"),
        "embed.text.out": at(f"{REFINER}.proj_in"),
        **_vector("embed.text.refiner.time", f"{REFINER}.time_text_embed.timestep_embedder"),
        **_vector("embed.text.refiner.pooled", f"{REFINER}.time_text_embed.text_embedder"),
        **{
            f"embed.text.refiner.blocks.*.{ours}": at(f"{REFINER}.token_refiner.refiner_blocks.{{}}.{theirs}")
            for ours, theirs in REFINED.items()
        },
        "head.modulation": at("norm_out.linear", form=SCALE_FIRST),
        "head.project": at("proj_out", form=CHANNELS_FIRST),
    },
    block={
        "modulation.up": at("norm1.linear", "norm1_context.linear", form=STREAMS),
        "attn.query": at("attn.to_q", form=PAIRS),
        "attn.key": at("attn.to_k", form=PAIRS),
        "attn.value": at("attn.to_v"),
        "attn.out": at("attn.to_out.0"),
        "attn.query_norm": at("attn.norm_q", form=PAIRS),
        "attn.key_norm": at("attn.norm_k", form=PAIRS),
        "attn.text_query": at("attn.add_q_proj", form=PAIRS),
        "attn.text_key": at("attn.add_k_proj", form=PAIRS),
        "attn.text_value": at("attn.add_v_proj"),
        "attn.text_out": at("attn.to_add_out"),
        "attn.text_query_norm": at("attn.norm_added_q", form=PAIRS),
        "attn.text_key_norm": at("attn.norm_added_k", form=PAIRS),
        "mlp.up": at("ff.net.0.proj"),
        "mlp.down": at("ff.net.2"),
        "text_mlp.up": at("ff_context.net.0.proj"),
        "text_mlp.down": at("ff_context.net.2"),
    },
    single_layer="single_transformer_blocks.{}",
    single={
        "modulation.up": at("norm.linear"),
        "attn.query": at("attn.to_q", form=PAIRS),
        "attn.key": at("attn.to_k", form=PAIRS),
        "attn.value": at("attn.to_v"),
        "attn.query_norm": at("attn.norm_q", form=PAIRS),
        "attn.key_norm": at("attn.norm_k", form=PAIRS),
        "mlp.up": at("proj_mlp"),
        "attn.out.weight": at("proj_out.weight", form=FIRST_COLUMNS),
        "attn.out.bias": at("proj_out.bias"),
        "mlp.down.weight": at("proj_out.weight", form=LAST_COLUMNS),
    },
)  # fmt: skip
