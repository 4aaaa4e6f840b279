"""A VAE on disk: a folder with `config.json` and `model.safetensors`, or one of diffusers. Nothing is unpickled."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from vidit.vae.autoencoder import Autoencoder, CausalVae
from vidit.vae.borrowed import load_borrowed
from vidit.vae.stored import vae_config
from vidit.whole_file import write_whole


def save_vae(folder: Path, vae: CausalVae, half: bool = False, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write weights and config to a folder, each file whole; `half` stores fp16, for git.

    `tensors` are the full weights, where those of `vae` are divided.
    """
    tensors = vae.state_dict() if tensors is None else tensors
    if half:
        tensors = {name: t if name.startswith("latent_") else t.half() for name, t in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "model.safetensors", save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}))
    write_whole(folder / "config.json", vae.config.model_dump_json(indent=1) + "\n")


def load_vae(folder: Path, device: torch.device, dtype: torch.dtype) -> Autoencoder:
    """A frozen VAE that computes in `dtype`. ValueError when files are missing, damaged or do not match."""
    config = vae_config(folder)
    if config.is_borrowed:
        return load_borrowed(folder, config, device, dtype)
    vae = CausalVae(config)
    path = folder / "model.safetensors"
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path}: {error}; copy the file again") from error
    try:
        vae.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its config.json: {error}") from error
    vae.dtype = dtype
    return vae.to(device).eval().requires_grad_(False)
