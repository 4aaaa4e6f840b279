"""A VAE on disk: a folder with `config.json` and `model.safetensors`. Nothing is unpickled."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from vidit.vae.autoencoder import CausalVae
from vidit.vae.stored import vae_config
from vidit.whole_file import write_whole


def vae_files(vae: CausalVae, state: dict[str, torch.Tensor] | None = None, half: bool = False) -> dict[str, bytes]:
    """File name -> content: weights (of `state`, else of `vae`) and config; `half` stores fp16, for git."""
    tensors = dict(vae.state_dict() if state is None else state)
    if half:
        tensors = {name: t if name.startswith("latent_") else t.half() for name, t in tensors.items()}
    weights = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    return {"model.safetensors": weights, "config.json": (vae.config.model_dump_json(indent=1) + "\n").encode()}


def save_vae(folder: Path, vae: CausalVae, state: dict[str, torch.Tensor] | None = None, half: bool = False) -> None:
    """Write `vae_files` to a folder. Each file takes its name when it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in vae_files(vae, state, half).items():
        write_whole(folder / name, content)


def load_vae(folder: Path, device: torch.device, dtype: torch.dtype) -> CausalVae:
    """A frozen VAE that computes in `dtype`. ValueError when files are missing, damaged or do not match."""
    vae = CausalVae(vae_config(folder))
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
