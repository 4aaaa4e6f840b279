"""Encoding a small dataset once, before the first step (`data.cache_latents`).

The VAE is frozen and the crop is fixed, so a clip's latent never changes; a run of many epochs then pays the
encoder once. Raw latents are kept, in the run directory, under a key of everything they depend on.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset as TorchDataset

from vidit.config import RunConfig
from vidit.data.captions import CaptionError
from vidit.data.limits import ClipError
from vidit.data.loader import LatentStore, MicroBatches, read_ahead
from vidit.data.shards import ClipRef
from vidit.train.step import to_pixels
from vidit.vae.autoencoder import CausalVae

ENCODE_BATCH = 16
Item = tuple[torch.Tensor | None, str]


class _Decoded(TorchDataset[Item]):
    """Clip number -> (pixels, caption), or (None, reason)."""

    def __init__(self, clips: MicroBatches):
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips.refs)

    def __getitem__(self, index: int) -> Item:
        try:
            return self.clips.decode(self.clips.refs[index])
        except (ClipError, CaptionError) as error:
            return None, str(error)


@torch.no_grad()
def encode_all(
    config: RunConfig, refs: Sequence[ClipRef], vae: CausalVae, device: torch.device, say: Callable[[str], None]
) -> tuple[list[ClipRef], LatentStore, list[tuple[str, str]]]:
    """(clips that decode, their latents and captions, the others with the reason)."""
    decoded = _Decoded(MicroBatches(config, refs, None, 1))
    items = read_ahead(decoded, range(len(refs)), config.data.num_workers, 2 * ENCODE_BATCH)
    kept: list[ClipRef] = []
    latents: list[torch.Tensor] = []
    captions: list[str] = []
    failed: list[tuple[str, str]] = []
    for start in range(0, len(refs), ENCODE_BATCH):
        good = []
        for ref in refs[start : start + ENCODE_BATCH]:
            pixels, text = next(items)
            if pixels is None:
                failed.append((ref.key, text))
            else:
                good.append(pixels)
                kept.append(ref)
                captions.append(text)
        if good:
            latents.append(vae.encode(to_pixels(torch.stack(good), device)).mean.cpu())
        if start and start % (32 * ENCODE_BATCH) == 0:
            say(f"encoded {start} of {len(refs)} clips")
    if not latents:
        raise ValueError(f"none of {len(refs)} clips decodes; the first: {failed[0][0]}: {failed[0][1]}")
    return kept, LatentStore(torch.cat(latents), captions), failed


def cached_latents(
    config: RunConfig,
    refs: Sequence[ClipRef],
    vae: CausalVae,
    device: torch.device,
    path: Path,
    say: Callable[[str], None],
) -> tuple[list[ClipRef], LatentStore, list[tuple[str, str]]]:
    """`encode_all`, kept in `path` for the next start of the same run."""
    key = _key(config, refs, vae)
    stored = _read(path, key)
    if stored is not None:
        latents, captions, keys, failed = stored
        by_key = {ref.key: ref for ref in refs}
        return [by_key[k] for k in keys], LatentStore(latents, captions), failed
    say(f"encoding {len(refs)} clips once")
    kept, store, failed = encode_all(config, refs, vae, device, say)
    facts = {"captions": store.captions, "keys": [ref.key for ref in kept], "failed": failed}
    partial = path.with_suffix(".partial")
    save_file({"latents": store.latents}, partial, metadata={"key": key, "facts": json.dumps(facts)})
    partial.replace(path)
    return kept, store, failed


def _key(config: RunConfig, refs: Sequence[ClipRef], vae: CausalVae) -> str:
    d = config.data
    digest = hashlib.sha256(repr((d.num_frames, d.height, d.width, d.fps, vae.dtype)).encode())
    for ref in refs:
        digest.update(f"{ref.shard_path.name}/{ref.key}/{ref.video_size}".encode())
    for tensor in vae.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, key: str) -> tuple[torch.Tensor, list[str], list[str], list[tuple[str, str]]] | None:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            if metadata["key"] != key:
                return None
            facts = json.loads(metadata["facts"])
            failed = [(name, reason) for name, reason in facts["failed"]]
            return file.get_tensor("latents"), facts["captions"], facts["keys"], failed
    except (OSError, SafetensorError):
        return None
