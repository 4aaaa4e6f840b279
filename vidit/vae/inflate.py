"""What the training of a VAE starts from: the weights of another, of the same geometry or of one for images.

An image VAE is one of this project that strides over no frames, or an AutoencoderKL of diffusers, which is one with
`vae.layers=ldm` (`vidit/vae/image_kl.py`). Its kernels go to the last frame of those here, and the weights of frames
before that are 0 (as Open-Sora-Plan and CV-VAE begin with a 2D VAE). Joints with shortcuts may stride over frames here
where those there do not: what a shortcut without parameters adds (`Down`, `Up`) is then another linear map of the same
numbers, and the difference goes into the convolution beside it. So an image, and the first frame of a video, is coded
and decoded as by the image VAE.
"""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from vidit.config import Vae
from vidit.vae.autoencoder import CausalVae
from vidit.vae.image_kl import image_vae
from vidit.vae.layers import CausalConv3d, Down, Up
from vidit.vae.place import vae_folder
from vidit.vae.store import load_vae
from vidit.vae.stored import vae_config

# What two VAEs may differ in and have the same weights: what is said of training, of parts and of storage.
ELSE = {"weights", "max_frames", "tile", "tile_overlap", "half_weights", "l1_weight", "l2_weight", "kl_weight"}


def starting_weights(c: Vae, folder: Path, inflate: bool) -> dict[str, Tensor]:
    """Every tensor of a VAE of geometry `c`, whole and in fp32, made of the one in `folder`, statistics included.

    ValueError where that cannot be read, or is of a geometry that does not fit.
    """
    place = vae_folder(Vae(weights=str(folder)))
    stored = vae_config(place, "vae_train.init")
    given = image_vae(place, stored) if stored.is_borrowed else load_vae(place, torch.device("cpu"), torch.float32)
    _check(c, given.config, folder, inflate)
    if not inflate:
        return dict(given.state_dict())
    with torch.device("meta"):
        made = CausalVae(c)
    tensors = dict(given.state_dict())
    for name, layer in made.named_modules():
        if isinstance(layer, CausalConv3d):
            tensors[f"{name}.weight"] = _last_frame(tensors[f"{name}.weight"])
    for name, layer in made.named_modules():
        weight, bias = f"{name}.conv.weight", f"{name}.conv.bias"
        if isinstance(layer, Down):
            tensors[weight] = _down(tensors[weight], cast(Down, given.get_submodule(name)), layer)
        elif isinstance(layer, Up):
            tensors[weight], tensors[bias] = _up(
                tensors[weight], tensors[bias], cast(Up, given.get_submodule(name)), layer
            )
    return tensors


def _check(c: Vae, given: Vae, folder: Path, inflate: bool) -> None:
    may = ELSE | ({"temporal_down"} if inflate else set())
    differ = [name for name in Vae.model_fields if name not in may and getattr(c, name) != getattr(given, name)]
    if differ:
        shown = "; ".join(f"vae.{name}={getattr(c, name)!r}, there {getattr(given, name)!r}" for name in differ)
        cure = "set vae_train.inflate=true, or give them alike" if differ == ["temporal_down"] else "give them alike"
        raise ValueError(f"vae_train.init={folder} is of another geometry: {shown}; {cure}")
    if inflate and given.temporal_stride > 1:
        raise ValueError(
            f"vae_train.inflate: {folder} strides over {given.temporal_stride} frames, and an image VAE over none; "
            "leave vae_train.inflate out to go on with its own kernels"
        )


@torch.no_grad()
def _last_frame(weight: Tensor) -> Tensor:
    """A kernel that looks at the last frame alone. An image stands in every frame that a kernel sees, so they add."""
    made = torch.zeros_like(weight)
    made[:, :, -1] = weight.sum(2)
    return made


@torch.no_grad()
def _down(weight: Tensor, source: Down, layer: Down) -> Tensor:
    """The kernel, with what the shortcut there adds to an image and the one here does not."""
    made, s = weight.clone(), layer.s
    channels = weight.shape[1]
    # One input for each number that a place of the output sees.
    each = torch.eye(channels * s * s).view(-1, channels, 1, s, s)
    missing = (source.shortcut(each) - layer.shortcut(each)).flatten(1).T
    made[:, :, -1, 1 : 1 + s, 1 : 1 + s] += missing.reshape(-1, channels, s, s)
    return made


@torch.no_grad()
def _up(weight: Tensor, bias: Tensor, source: Up, layer: Up) -> tuple[Tensor, Tensor]:
    """The pointwise kernel and its bias, for every frame that comes of one the same."""
    channels, s = layer.channels, layer.s
    each = torch.eye(channels).view(channels, channels, 1, 1, 1)
    there, here = (_depth(up, each).flatten(1).T for up in (source, layer))
    kernel = _over_time(weight.flatten(1) + there, s, layer.t) - here
    return kernel.view(-1, channels, 1, 1, 1), _over_time(bias, s, layer.t)


def _depth(up: Up, x: Tensor) -> Tensor:
    """What the shortcut of an Up adds to its depth."""
    return x.repeat_interleave(up.conv.out_channels // up.channels, dim=1)


def _over_time(x: Tensor, s: int, t: int) -> Tensor:
    """Of (c p q) entries the (c t p q) of a depth with frames."""
    return x.unflatten(0, (-1, s * s)).unsqueeze(1).expand(-1, t, *[-1] * x.ndim).flatten(0, 2)
