"""The VAE of a run as torch.export programs in a folder, for use without this project.

A `.pt2` file is for deployment: it is written here and read by `torch.export.load` wherever it is used, never by
this project, which loads safetensors only.
"""

import json
from pathlib import Path
from typing import Literal

import torch

from vidit.export.files import DTYPES, new_folder
from vidit.vae.autoencoder import CausalVae
from vidit.vae.program import vae_programs
from vidit.vae.store import load_vae
from vidit.whole_file import write_whole


def export_vae(source: Path, out: Path, dtype: Literal["fp32", "bf16"] = "fp32") -> list[Path]:
    """Write `encode.pt2`, `decode.pt2` and the VAE's `config.json` into the new folder `out`; returns the files.

    Args:
        source: a run, whose VAE lies in its folder `vae`, or the folder of a VAE itself.
        dtype: that the programs compute in; pixels and latents are fp32.

    Raises ValueError where there is no VAE or `out` holds something, RuntimeError on a full disk.
    """
    folder = source / "vae" if (source / "vae").is_dir() else source
    vae = load_vae(folder, torch.device("cpu"), DTYPES[dtype])
    if not isinstance(vae, CausalVae):
        raise ValueError(
            f"{folder} is a {vae.config.kind} of diffusers, which is no program of this project; use diffusers"
        )
    with new_folder(out) as partial:
        for name, program in vae_programs(vae).items():
            torch.export.save(program, partial / f"{name}.pt2")
        geometry = vae.config.model_copy(update={"weights": None})
        about = {"dtype": dtype, "vae": geometry.model_dump(mode="json")}
        write_whole(partial / "config.json", json.dumps(about, indent=1) + "\n")
    return sorted(out.iterdir())
