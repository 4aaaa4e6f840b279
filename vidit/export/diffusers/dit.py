"""DiT (2212.09748), a model of images by class: DiTTransformer2DModel, and Transformer2DModel as older files name it.

Ours knows no labels: what is read is the model of the null label, whose embedding goes into the bias of the time's.
Each block there has an embedding of time and label of its own, all blocks here share one, so only a checkpoint whose
blocks hold copies can be read, as those converted from DiT's own do. Written are copies, and a table of one label and
the null label whose entries are 0.

Two numbers of the class are not DiT's: frequencies of the time reach 1/10000 (`model.time_spacing`), and the norm
before the MLP has `norm_eps`, 1e-5 by default, where the others have 1e-6 (`model.mlp_norm_eps`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vidit.config import DIT as IMAGES
from vidit.config import Model
from vidit.dtypes import widen
from vidit.export.diffusers.family import Family, Geometry, at, require_numbers
from vidit.export.diffusers.forms import KERNEL_2D, Form

FREE = ("patch", "activation")
MLP_RATIO = 4
NORM_EPS = 1e-6
CLASS_EPS = 1e-5
GELU = {"gelu-approximate": "gelu_tanh", "gelu": "gelu"}
NUM_LABELS = 1
COUNTS = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "patch_size", "sample_size")
SAID = (
    "embed.conditioning.time.out.bias holds the null label's vector too, and the other labels are left out: this is "
    "the model without a class"
)
CURE = (
    "train a model that becomes a DiTTransformer2DModel with model.time_spacing=closed and model.position_span=<tokens "
    "along a side of the grid> (16 for 256 pixels, a VAE of stride 8 and patches of 2)"
)
EMBEDDERS = "transformer_blocks.{layer}.norm1.emb."


def _shared(parts: Sequence[Tensor], c: Model) -> Tensor:
    """The one tensor that all blocks hold. ValueError where they do not."""
    differ = [str(layer) for layer, part in enumerate(parts) if not torch.equal(part, parts[0])]
    if differ:
        raise ValueError(
            f"of {len(parts)} blocks of this DiTTransformer2DModel, {len(differ)} embed time and label otherwise than "
            f"block 0 ({', '.join(differ[:5])}{' ...' * (len(differ) > 5)}); a model here has one embedding for all; "
            "take a checkpoint whose blocks hold copies of one, as those converted from DiT's do"
        )
    return parts[0]


def _with_null_label(parts: Sequence[Tensor], c: Model) -> Tensor:
    """Of biases, then tables of labels, the bias plus the last label's vector; a sum of two numbers in bf16 is none."""
    biases, tables = parts[: c.num_layers], parts[c.num_layers :]
    null: Tensor = _shared([table[-1] for table in tables], c)
    return widen(_shared(biases, c)) + widen(null)


def _without_labels(bias: Tensor, c: Model) -> tuple[Tensor, ...]:
    return (bias,) * c.num_layers + (bias.new_zeros(NUM_LABELS + 1, len(bias)),) * c.num_layers


COPIES = Form(lambda x, c: (x,) * c.num_layers, _shared)
NULL_LABEL = Form(_without_labels, _with_null_label)


def _check_labels(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError where config and tables do not agree on the number of labels: the null one is the last row."""
    for name, shape in shapes.items():
        if name.endswith("class_embedder.embedding_table.weight"):
            said = config.get("num_embeds_ada_norm", shape[0] - 1)
            if said != shape[0] - 1:
                raise ValueError(
                    f"config.json of this DiTTransformer2DModel has num_embeds_ada_norm={said!r}, and {name} is of "
                    f"{shape[0] - 1} labels and the null label; take both from one checkpoint"
                )


def _read(config: Mapping[str, Any]) -> Geometry:
    require_numbers(config, COUNTS, ("norm_eps",) if "norm_eps" in config else (), "DiTTransformer2DModel")
    width, size = config["num_attention_heads"] * config["attention_head_dim"], config["sample_size"]
    channels, out = config["in_channels"], config["out_channels"] or config["in_channels"]
    if out not in (channels, 2 * channels):
        raise ValueError(
            f"{channels} channels in and {out} out; only as many out, or twice that with a variance, are read"
        )
    if config["activation_fn"] not in GELU:
        raise ValueError(f"activation_fn={config['activation_fn']!r} is not known here; {' and '.join(GELU)} are")
    eps = config.get("norm_eps", CLASS_EPS)
    model = Model(
        **{**IMAGES, "patch": config["patch_size"], "activation": GELU[config["activation_fn"]]},
        num_layers=config["num_layers"],
        width=width,
        num_heads=config["num_attention_heads"],
        mlp_width=MLP_RATIO * width,
        position_span=size // config["patch_size"],
        mlp_norm_eps=0.0 if eps == NORM_EPS else eps,
        time_spacing="closed",
        learned_variance=out == 2 * channels,
    )
    return Geometry(model, channels, 0, said=SAID)


def _write(g: Geometry) -> dict[str, Any]:
    c = g.model
    kept = {
        "model.patch": (c.patch, (1, c.patch[-1], c.patch[-1])),
        "model.mlp_width": (c.mlp_width, MLP_RATIO * c.width),
        "model.position_span": (c.position_span, c.position_span or "the size of training"),
        "model.position_scale": (c.position_scale, (1.0, 1.0, 1.0)),
        "model.time_frequencies": (c.time_frequencies, 256),
        "model.time_width": (c.cond_width, c.width),
    }
    if odd := [f"{name}={found} where it has {wanted}" for name, (found, wanted) in kept.items() if found != wanted]:
        cure = "" if c.position_span else f"; {CURE}"
        raise ValueError(f"DiTTransformer2DModel cannot express this model: {'; '.join(odd)}{cure}")
    return {
        "patch_size": c.patch[-1], "num_attention_heads": c.num_heads, "attention_head_dim": c.width // c.num_heads,
        "in_channels": g.channels, "out_channels": g.channels * c.out_factor, "num_layers": c.num_layers,
        "sample_size": c.position_span * c.patch[-1], "norm_eps": c.mlp_norm_eps or NORM_EPS,
        "activation_fn": next(theirs for theirs, ours in GELU.items() if ours == c.activation),
        "num_embeds_ada_norm": NUM_LABELS,
    }  # fmt: skip


DIT = Family(
    name="dit",
    cls="DiTTransformer2DModel",
    older=("Transformer2DModel",),
    fields={
        **{name: value for name, value in IMAGES.items() if name not in FREE},
        "time_spacing": "closed", "norm_eps": NORM_EPS, "temporal_attention": False, "frame_times": False,
    },
    fixed={
        "attention_bias": True, "dropout": 0.0, "norm_type": "ada_norm_zero", "norm_elementwise_affine": False,
        "upcast_attention": False,
    },
    # Of the older class, which is more than DiT.
    known={
        "cross_attention_dim": None, "num_vector_embeds": None, "use_linear_projection": False,
        "only_cross_attention": False, "double_self_attention": False, "caption_channels": None,
        "interpolation_scale": None, "attention_type": "default",
    },
    read=_read,
    write=_write,
    layers=("transformer_blocks.{}",),
    outside={
        "embed.patch.project": at("pos_embed.proj", form=KERNEL_2D),
        "embed.conditioning.time.up": at(EMBEDDERS + "timestep_embedder.linear_1", form=COPIES),
        "embed.conditioning.time.out.weight": at(EMBEDDERS + "timestep_embedder.linear_2.weight", form=COPIES),
        "embed.conditioning.time.out.bias": at(
            EMBEDDERS + "timestep_embedder.linear_2.bias",
            EMBEDDERS + "class_embedder.embedding_table.weight",
            form=NULL_LABEL,
        ),
        "head.modulation": at("proj_out_1"),
        "head.project": at("proj_out_2"),
    },
    block={
        "modulation.up": at("norm1.linear"),
        "attn.query": at("attn1.to_q"),
        "attn.key": at("attn1.to_k"),
        "attn.value": at("attn1.to_v"),
        "attn.out": at("attn1.to_out.0"),
        "mlp.up": at("ff.net.0.proj"),
        "mlp.down": at("ff.net.2"),
    },
    computed=("pos_embed.pos_embed",),
    free=("mlp_norm_eps",),
    cures={"time_spacing": CURE},
    agree=_check_labels,
)  # fmt: skip
