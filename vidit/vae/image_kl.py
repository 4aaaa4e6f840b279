"""AutoencoderKL of diffusers, a VAE of images (latent diffusion, 2112.10752), as one of this project.

It is `CausalVae` with `vae.layers=ldm` and no stride over frames: every kernel looks at the last frame alone, so each
image is coded as there. Two of its layers have no place of their own: `quant_conv`, a matrix behind the encoder's last
convolution, is multiplied into that, and a decoder without `post_quant_conv` has the identity there.

Only `config.json` and the safetensors file are read; diffusers is not needed.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vidit.config import Vae
from vidit.vae.autoencoder import LOG_VARIANCE, CausalVae
from vidit.vae.borrowed import statistics
from vidit.vae.catalog import WEIGHTS

# What the class takes for an entry that its config.json lacks, as older files do.
DEFAULTS: dict[str, Any] = {
    "layers_per_block": 1, "norm_num_groups": 32, "act_fn": "silu", "mid_block_add_attention": True,
    "use_quant_conv": True, "use_post_quant_conv": True, "scaling_factor": 0.18215,
}  # fmt: skip
MIDDLE_BLOCKS = 2
OUTSIDE = {
    "encoder.first": "encoder.conv_in", "encoder.norm": "encoder.conv_norm_out", "encoder.last": "encoder.conv_out",
    "decoder.mix": "post_quant_conv", "decoder.first": "decoder.conv_in", "decoder.norm": "decoder.conv_norm_out",
    "decoder.last": "decoder.conv_out",
}  # fmt: skip
# Within a layer, where the name is another; what it is called in older files.
WITHIN = {
    "shortcut": "conv_shortcut", "norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v",
    "out": "to_out.0",
}  # fmt: skip
OLDER = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def image_vae(folder: Path, borrowed: Vae) -> CausalVae:
    """The VAE of a folder that `borrowed` describes, on the CPU in fp32, with its latent statistics.

    ValueError for another class, a geometry that has no place here, or tensors that do not fit.
    """
    if borrowed.kind != "AutoencoderKL":
        raise ValueError(
            f"{folder} is an {borrowed.kind}; of diffusers only AutoencoderKL, a VAE of images, has layers that a VAE "
            "of this project begins with (others can be borrowed as vae.weights)"
        )
    facts = {**DEFAULTS, **json.loads((folder / "config.json").read_text())}
    try:
        vae = CausalVae(image_geometry(folder, facts))
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} of AutoencoderKL lacks {error}; copy the file again") from error
    try:
        given = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {folder / WEIGHTS}: {error}; copy the file again") from error
    with torch.no_grad():
        tensors = _tensors(vae, facts, {name: tensor.float() for name, tensor in given.items()}, folder)
    mean, std = statistics(borrowed, facts)
    vae.load_state_dict({**tensors, "latent_mean": mean, "latent_std": std})
    return vae


def image_geometry(folder: Path, facts: Mapping[str, Any]) -> Vae:
    """What a `config.json` says, as a section. ValueError for what no setting here expresses."""
    widths, layers = list(facts["block_out_channels"]), facts["layers_per_block"]
    levels, blocks = len(widths), {"down": "DownEncoderBlock2D", "up": "UpDecoderBlock2D"}
    odd = [f"{way}_block_types={facts[f'{way}_block_types']}" for way, kind in blocks.items()
           if set(facts[f"{way}_block_types"]) != {kind}]  # fmt: skip
    odd += [f"block_out_channels={widths}"] if any(width % widths[0] for width in widths) else []
    odd += [f"act_fn={facts['act_fn']}"] if facts["act_fn"] not in ("silu", "swish") else []
    if odd:
        raise ValueError(
            f"{folder} has {' and '.join(odd)}; a VAE here has {' and '.join(blocks.values())}, SiLU, and widths that "
            "are multiples of the first"
        )
    return Vae(
        layers="ldm",
        mid_attention=facts["mid_block_add_attention"],
        norm="group",
        norm_groups=facts["norm_num_groups"],
        latent_channels=facts["latent_channels"],
        base_channels=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        num_res_blocks=(*[layers] * (levels - 1), layers + MIDDLE_BLOCKS),
        decoder_res_blocks=(*[layers + 1] * (levels - 1), layers + 1 + MIDDLE_BLOCKS),
        spatial_down=(True,) * (levels - 1),
        temporal_down=(False,) * (levels - 1),
    )


def _tensors(vae: CausalVae, facts: Mapping[str, Any], given: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Every parameter here, made of theirs. ValueError where one is missing, left over, or of another shape."""
    left = {_newer(name): tensor for name, tensor in given.items()}
    missing: list[str] = []

    def take(name: str, shape: torch.Size) -> Tensor:
        found = left.pop(name, None)
        if found is None:
            missing.append(name)
            return torch.zeros(shape)
        return _last_frame(found, shape, name, folder)

    shapes = {name: parameter.shape for name, parameter in vae.named_parameters()}
    layers = {"encoder": list(_encoder_layers(facts)), "decoder": list(_decoder_layers(facts))}
    mixes = facts["use_post_quant_conv"]
    made = {name: take(_theirs(name, layers), shape) for name, shape in shapes.items() if mixes or "mix" not in name}
    if not mixes:
        channels = vae.config.latent_channels
        made["decoder.mix.weight"] = torch.eye(channels).view(shapes["decoder.mix.weight"])
        made["decoder.mix.bias"] = torch.zeros(channels)
    outputs = 2 * vae.config.latent_channels
    matrix, shift = torch.eye(outputs), torch.zeros(outputs)
    if facts["use_quant_conv"]:
        matrix = take("quant_conv.weight", torch.Size((outputs, outputs, 1, 1, 1))).flatten(1)
        shift = take("quant_conv.bias", shift.shape)
    _multiply_in(made, matrix, shift)
    told = [f"{len(names)} {word}: {', '.join(sorted(names)[:5])}" for word, names in
            (("missing", missing), ("unknown", list(left))) if names]  # fmt: skip
    if told:
        raise ValueError(f"{folder / WEIGHTS} does not fit its config.json: {'; '.join(told)}; copy both again")
    return made


def _multiply_in(made: dict[str, Tensor], matrix: Tensor, shift: Tensor) -> None:
    """Their matrix (2c, 2c) and bias behind the encoder's last convolution, made part of that."""
    shift[len(shift) // 2 :] -= LOG_VARIANCE  # which the encoder here adds
    kernel = made["encoder.last.weight"]
    made["encoder.last.weight"] = (matrix @ kernel.flatten(1)).view_as(kernel)
    made["encoder.last.bias"] = matrix @ made["encoder.last.bias"] + shift


def _last_frame(found: Tensor, shape: torch.Size, name: str, folder: Path) -> Tensor:
    """A tensor of theirs in a shape of ours: kernels get frames, the last of which is theirs; a matrix is a kernel."""
    is_kernel = len(shape) > 1
    flat = shape[:2] + shape[3:] if is_kernel else shape
    if found.shape != flat and found.shape != flat[:2]:
        raise ValueError(
            f"{name} of {folder / WEIGHTS} is {tuple(found.shape)}, and {tuple(flat)} by the config.json beside it; "
            "take both from one VAE"
        )
    made = torch.zeros(shape)
    (made[:, :, -1] if is_kernel else made).copy_(found.reshape(flat))
    return made


def _theirs(name: str, layers: Mapping[str, list[str]]) -> str:
    """Their name of a parameter here."""
    module, _, last = name.rpartition(".")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{last}"
    part, _, number, within = module.split(".")
    return f"{layers[part][int(number)]}.{WITHIN.get(within, within)}.{last}"


def _newer(name: str) -> str:
    for newer, older in OLDER.items():
        if ".attentions." in name and older in name:
            return name.replace(older, newer)
    return name


def _encoder_layers(facts: Mapping[str, Any]) -> Iterator[str]:
    """Their names of `encoder.layers`, in order."""
    levels = len(facts["block_out_channels"])
    for level in range(levels):
        yield from (f"encoder.down_blocks.{level}.resnets.{n}" for n in range(facts["layers_per_block"]))
        if level + 1 < levels:
            yield f"encoder.down_blocks.{level}.downsamplers.0"
    yield from _middle("encoder", facts)


def _decoder_layers(facts: Mapping[str, Any]) -> Iterator[str]:
    yield from _middle("decoder", facts)
    levels = len(facts["block_out_channels"])
    for level in range(levels):
        yield from (f"decoder.up_blocks.{level}.resnets.{n}" for n in range(facts["layers_per_block"] + 1))
        if level + 1 < levels:
            yield f"decoder.up_blocks.{level}.upsamplers.0"


def _middle(part: str, facts: Mapping[str, Any]) -> Iterator[str]:
    yield f"{part}.mid_block.resnets.0"
    if facts["mid_block_add_attention"]:
        yield f"{part}.mid_block.attentions.0"
    yield f"{part}.mid_block.resnets.1"
