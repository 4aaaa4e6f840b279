"""The image U-Net of diffusers, Stable Diffusion's: its geometry and names, read into ours without layers over time.

A table says everything about names; what is not in it is an error, in either direction. Where theirs has pointwise
convolutions for projections, ours has the same numbers as matrices.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidit.config import Unet
from vidit.model.unet.unet import VideoUnet
from vidit.train.weights_folder import Weights, require_keys

CLASS = "UNet2DConditionModel"
ATTENDING, PLAIN = "CrossAttn{}Block2D", "{}Block2D"
# What a config.json has to say where it says it at all: another value is another network.
FIXED: dict[str, Any] = {
    "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0, "only_cross_attention": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "downsample_padding": 1, "mid_block_scale_factor": 1, "dropout": 0.0,
    "act_fn": "silu", "norm_eps": 1e-5, "transformer_layers_per_block": 1, "encoder_hid_dim": None,
    "num_attention_heads": None, "dual_cross_attention": False, "class_embed_type": None, "num_class_embeds": None,
    "addition_embed_type": None, "resnet_time_scale_shift": "default", "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0, "time_embedding_type": "positional", "time_embedding_dim": None,
    "time_embedding_act_fn": None, "timestep_post_act": None, "time_cond_proj_dim": None, "conv_in_kernel": 3,
    "conv_out_kernel": 3, "attention_type": "default", "cross_attention_norm": None,
}  # fmt: skip
TRANSFORMER = "transformer_blocks.0."
# Of a name here what is found there, in this order; what a parameter is called last stays.
NAMES: tuple[tuple[str, str], ...] = (
    (r"^time\.up", "time_embedding.linear_1"),
    (r"^time\.out", "time_embedding.linear_2"),
    (r"^first", "conv_in"),
    (r"^head\.norm", "conv_norm_out"),
    (r"^head\.project", "conv_out"),
    (r"^down\.(\d+)\.resample", r"down_blocks.\1.downsamplers.0.conv"),
    (r"^up\.(\d+)\.resample", r"up_blocks.\1.upsamplers.0.conv"),
    (r"^(down|up)\.(\d+)\.cells\.(\d+)\.resnet", r"\1_blocks.\2.resnets.\3"),
    (r"^(down|up)\.(\d+)\.cells\.(\d+)\.attention", r"\1_blocks.\2.attentions.\3"),
    (r"^mid\.(\d+)\.resnet", r"mid_block.resnets.\1"),
    (r"^mid\.(\d+)\.attention", r"mid_block.attentions.\1"),
    (r"(resnets\.\d+)\.conv\.", r"\1.conv1."),
    (r"(resnets\.\d+)\.closing\.", r"\1.conv2."),
    (r"(resnets\.\d+)\.time\.", r"\1.time_emb_proj."),
    (r"(resnets\.\d+)\.shortcut\.", r"\1.conv_shortcut."),
    (r"(attentions\.\d+)\.enter\.", r"\1.proj_in."),
    (r"(attentions\.\d+)\.leave\.", r"\1.proj_out."),
    (r"(attentions\.\d+)\.attn_norm\.", rf"\1.{TRANSFORMER}norm1."),
    (r"(attentions\.\d+)\.cross_norm\.", rf"\1.{TRANSFORMER}norm2."),
    (r"(attentions\.\d+)\.mlp_norm\.", rf"\1.{TRANSFORMER}norm3."),
    (r"(attentions\.\d+)\.attn\.", rf"\1.{TRANSFORMER}attn1."),
    (r"(attentions\.\d+)\.cross\.", rf"\1.{TRANSFORMER}attn2."),
    (r"(attn[12])\.(q|k|v)\w+\.weight", r"\1.to_\2.weight"),
    (r"(attn[12])\.out\.", r"\1.to_out.0."),
    (r"(attentions\.\d+)\.mlp\.up\.", rf"\1.{TRANSFORMER}ff.net.0.proj."),
    (r"(attentions\.\d+)\.mlp\.down\.", rf"\1.{TRANSFORMER}ff.net.2."),
)


class UnetGeometry(NamedTuple):
    """What a U-Net is built from: its config, latent channels, width of the text features."""

    unet: Unet
    channels: int
    text_width: int


def imported_unet(config: Mapping[str, Any], given: Weights) -> tuple[UnetGeometry, Weights]:
    """Geometry and tensors under our names, of their config.json and tensors.

    Raises ValueError where their geometry is not known here, and where keys are missing or unknown.
    """
    geometry = unet_geometry(config)
    with torch.device("meta"):
        ours = VideoUnet(geometry.unet, geometry.channels, (1, 1, 1), geometry.text_width)
    wanted = {name: tuple(p.shape) for name, p in ours.state_dict().items()}
    names = {name: their_name(name) for name in wanted}
    require_keys(set(names.values()), set(given.shapes), CLASS)

    def get(name: str) -> Tensor:
        found, shape = given.get(names[name]), wanted[name]
        if found.ndim == 4 and len(shape) == 2:
            found = found.flatten(1)
        if tuple(found.shape) != shape:
            raise ValueError(
                f"{names[name]} becomes {tuple(found.shape)}, but {name} is {shape} by the config.json beside it; take "
                "both from one checkpoint"
            )
        return found.contiguous()

    return geometry, Weights(wanted, get)


def their_name(name: str) -> str:
    """What a parameter of ours is called there."""
    for ours, theirs in NAMES:
        name = re.sub(ours, theirs, name)
    return name


def unet_geometry(config: Mapping[str, Any]) -> UnetGeometry:
    """Of their config.json. ValueError with everything in it that no U-Net here has."""
    try:
        if odd := list(_differences(config)):
            raise ValueError(f"this {CLASS} cannot be expressed here: {'; '.join(odd)}")
        widths = config["block_out_channels"]
        heads = _heads(config)
        same = len(set(heads)) == 1
        return UnetGeometry(
            Unet(
                channels=widths[0],
                multipliers=tuple(width // widths[0] for width in widths),
                num_res_blocks=config["layers_per_block"],
                attention=tuple(kind == ATTENDING.format("Down") for kind in config["down_block_types"]),
                num_heads=heads[0] if same else 0,
                **({} if same else {"head_dim": widths[0] // heads[0]}),
                norm_groups=config["norm_num_groups"],
                temporal="none",
            ),
            config["in_channels"],
            config["cross_attention_dim"],
        )
    except KeyError as error:
        raise ValueError(f"config.json of this {CLASS} lacks {error}; take the whole file") from error


def _heads(config: Mapping[str, Any]) -> list[int]:
    """Of each level: what they call the dim of a head is the number of heads."""
    heads, levels = config["attention_head_dim"], len(config["block_out_channels"])
    return [heads] * levels if isinstance(heads, int) else list(heads)


def _differences(config: Mapping[str, Any]) -> Iterator[str]:
    """What keeps theirs from being one of ours, one line each."""
    for key, wanted in FIXED.items():
        if key in config and config[key] != wanted:
            yield f"{key}={config[key]!r} where only {wanted!r} is known"
    widths, down, up = (list(config[k]) for k in ("block_out_channels", "down_block_types", "up_block_types"))
    attends = [kind == ATTENDING.format("Down") for kind in down]
    if any(kind not in (ATTENDING.format("Down"), PLAIN.format("Down")) for kind in down):
        yield f"down_block_types={down} where only CrossAttnDownBlock2D and DownBlock2D are known"
    if up != [(ATTENDING if on else PLAIN).format("Up") for on in reversed(attends)]:
        yield f"up_block_types={up}, which do not mirror down_block_types={down}"
    if any(width % widths[0] for width in widths):
        yield f"block_out_channels={widths}, which are no multiples of the first"
    if config["out_channels"] != config["in_channels"]:
        yield f"{config['in_channels']} channels in and {config['out_channels']} out, where only as many are known"
    for key in ("layers_per_block", "cross_attention_dim"):
        if not isinstance(config[key], int):
            yield f"{key}={config[key]!r} where only one number is known"
    heads = _heads(config)
    if len(set(heads)) > 1 and len({width / own for width, own in zip(widths, heads, strict=False)}) > 1:
        yield f"attention_head_dim={heads}, which are neither one number of heads nor heads of one size"
