"""Where the files of `vae.weights` lie: a folder, `vae/` of a pipeline's folder, or the same of a hub name. No torch.

From the hub comes one pinned commit, and of that nothing but the config and the safetensors of the VAE.
"""

import re
from pathlib import Path

from vidit.config import Vae
from vidit.vae.catalog import WEIGHTS

_COMMIT = re.compile(r"[0-9a-f]{40}")


def vae_folder(vae: Vae) -> Path:
    """The folder with `config.json`. ValueError where name and revision do not fit, or the hub cannot be asked."""
    name, revision = vae.weights or "", vae.revision
    if revision is None:
        folder = Path(name)
        return folder / "vae" if (folder / "model_index.json").is_file() else folder
    if Path(name).is_dir():
        raise ValueError(f"vae.revision={revision} has no effect on the local folder {name}; leave it out")
    if not _COMMIT.fullmatch(revision):
        raise ValueError(f"vae.revision={revision} can move; pin the 40-digit commit hash")
    folder = _fetched(name, revision)
    return folder / "vae" if (folder / "vae" / "config.json").is_file() else folder


def _fetched(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    files = [f"{place}{file}" for place in ("", "vae/") for file in ("config.json", WEIGHTS)]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (OSError, ValueError) as error:  # the hub's own errors are of these, and so is no network
        raise ValueError(
            f"vae.weights={name} at vae.revision={revision} cannot be fetched: {error}; run this once where the hub "
            "can be reached, or give a folder"
        ) from error
