"""The VAE of a run as torch.export programs in a folder, for use without this project.

A `.pt2` file is for deployment: it is written here and read by `torch.export.load` wherever it is used, never by
this project, which loads safetensors only.
"""

import json
import shutil
from pathlib import Path
from typing import Literal

import torch

from vidit.vae.program import vae_programs
from vidit.vae.store import load_vae
from vidit.whole_file import full_disk_explained, write_whole


def export_vae(source: Path, out: Path, dtype: Literal["fp32", "bf16"] = "fp32") -> list[Path]:
    """Write `encode.pt2`, `decode.pt2` and the VAE's `config.json` into the new folder `out`; returns the files.

    Args:
        source: a run, whose VAE lies in its folder `vae`, or the folder of a VAE itself.
        dtype: that the programs compute in; pixels and latents are fp32.

    Raises ValueError where there is no VAE or `out` holds something, RuntimeError on a full disk.
    """
    folder = source / "vae" if (source / "vae").is_dir() else source
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already and not empty; give --out a new folder")
    vae = load_vae(folder, torch.device("cpu"), {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    partial = out.with_name(f".{out.name}.partial")
    with full_disk_explained(out):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, program in vae_programs(vae).items():
                torch.export.save(program, partial / f"{name}.pt2")
            geometry = vae.config.model_copy(update={"weights": None})
            about = {"dtype": dtype, "vae": geometry.model_dump(mode="json")}
            write_whole(partial / "config.json", json.dumps(about, indent=1) + "\n")
            partial.replace(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return sorted(out.iterdir())
