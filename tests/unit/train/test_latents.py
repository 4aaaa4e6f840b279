"""The latent cache: everything it depends on is in its key, what is encoded is kept, captions are never old."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vidit.config import RunConfig
from vidit.data.shard_writer import ShardWriter
from vidit.data.shards import read_clip, read_index
from vidit.train import latents
from vidit.train.latents import LatentCache
from vidit.train.run import run
from vidit.train.stop import StoppedError
from vidit.vae.autoencoder import CausalVae
from vidit.vae.store import load_vae
from vidit.vae.stored import adopt_vae

Configure = Callable[..., RunConfig]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "ENCODE_BATCH", 2)
    monkeypatch.setattr(latents, "PART_CLIPS", 4)


@pytest.fixture
def config(configure: Configure, tmp_path: Path) -> RunConfig:
    return adopt_vae(configure(tmp_path))


@pytest.fixture
def vae(config: RunConfig) -> CausalVae:
    return load_vae(Path(config.vae.weights or ""), CPU, torch.float32)


class Counter:
    """A check that raises at its n-th call, and counts the clips that were asked for."""

    def __init__(self, stop_at: int = 10**9):
        self.calls, self.stop_at = 0, stop_at

    def __call__(self) -> None:
        self.calls += 1
        if self.calls > self.stop_at:
            raise StoppedError


def load(
    config: RunConfig, vae: CausalVae, folder: Path, check: Counter | None = None
) -> tuple[list[str], torch.Tensor]:
    refs = read_index(config.data.train)
    kept, store, failed = LatentCache(config, refs, vae, CPU, folder).load(lambda _: None, check or Counter())
    assert failed == []
    assert [ref.key for ref in kept] == [ref.key for ref in refs]
    return list(store.captions), store.latents


def test_it_is_read_back(config: RunConfig, vae: CausalVae, tmp_path: Path) -> None:
    captions, first = load(config, vae, tmp_path / "latents")
    assert first.shape == (16, 4, 3, 8, 8)
    assert captions == [read_clip(ref)[1] for ref in read_index(config.data.train)]
    assert len(list((tmp_path / "latents").iterdir())) == 4
    again = Counter()
    assert torch.equal(load(config, vae, tmp_path / "latents", again)[1], first)
    assert again.calls == 0, "nothing is encoded twice"
    with torch.no_grad():
        vae.encoder.last.bias.add_(1)
    moved = load(config, vae, tmp_path / "latents")[1]
    assert not torch.equal(first, moved), "another VAE encodes anew"


@pytest.mark.parametrize("stop_at", [0, 1, 2, 3, 7, 13, 22])
def test_a_stop_keeps_what_was_encoded(config: RunConfig, vae: CausalVae, tmp_path: Path, stop_at: int) -> None:
    whole = load(config, vae, tmp_path / "whole")[1]
    folder = tmp_path / "latents"
    with pytest.raises(StoppedError):
        load(config, vae, folder, Counter(stop_at))
    rest = Counter()
    assert torch.equal(load(config, vae, folder, rest)[1], whole), "bit for bit"
    batches = stop_at // 3  # a batch of two clips checks three times
    assert rest.calls == 24 - 3 * batches


def test_every_part_is_checked(config: RunConfig, vae: CausalVae, tmp_path: Path) -> None:
    """A torn part, one of other clips, and one with another key are encoded again; the parts before them stay."""
    folder = tmp_path / "latents"
    whole = load(config, vae, folder)[1]
    path = folder / "clips-00000008.safetensors"
    for damaged in (path.read_bytes()[:100], b"", (folder / "clips-00000004.safetensors").read_bytes()):
        path.write_bytes(damaged)
        check = Counter()
        assert torch.equal(load(config, vae, folder, check)[1], whole)
        assert check.calls >= 6


def packed(folder: Path, clips: list[tuple[str, bytes, str]]) -> Path:
    with ShardWriter(folder) as writer:
        for key, video, text in clips:
            sidecar = {"caption": text, "width": 32, "height": 32, "fps": 8.0, "num_frames": 5}
            writer.add(key, video, sidecar)
    return folder


@pytest.mark.parametrize("manifest", [True, False])
def test_captions_are_never_old(
    configure: Configure, vae: CausalVae, tiny_clips: Path, tmp_path: Path, manifest: bool
) -> None:
    """The same videos packed with captions of the same length under the same names."""
    clips = [(ref.key, read_clip(ref)[0]) for ref in read_index(tiny_clips)[:3]]
    data = tmp_path / "data"
    config = adopt_vae(configure(tmp_path, data={"train": str(data)}))
    for text in ("a red dog", "a big cat"):
        shutil.rmtree(data, ignore_errors=True)
        packed(data, [(*clip, text) for clip in clips])
        if not manifest:
            (data / "dataset.json").unlink()
        captions, _ = load(config, vae, tmp_path / "latents")
        assert captions == [text] * 3


def test_other_videos_of_the_same_name_and_size_are_found(
    configure: Configure, vae: CausalVae, tiny_clips: Path, tmp_path: Path
) -> None:
    one, other = (read_clip(ref)[0] for ref in read_index(tiny_clips)[:2])
    size = max(len(one), len(other))
    data = tmp_path / "data"
    config = adopt_vae(configure(tmp_path, data={"train": str(data)}))
    found = []
    for video in (one, other):
        shutil.rmtree(data, ignore_errors=True)
        packed(data, [("a", video.ljust(size, b"\0"), "x")])
        found.append(load(config, vae, tmp_path / "latents")[1])
    assert not torch.equal(*found)


def test_clips_that_do_not_decode(configure: Configure, vae: CausalVae, tiny_clips: Path, tmp_path: Path) -> None:
    videos = [read_clip(ref)[0] for ref in read_index(tiny_clips)[:6]]
    broken = {0, 1, 4}
    clips = [(f"{i}", v[: len(v) // 2] if i in broken else v, "x") for i, v in enumerate(videos)]
    config = adopt_vae(configure(tmp_path, data={"train": str(packed(tmp_path / "data", clips))}))
    refs = read_index(tmp_path / "data")
    for _ in range(2):  # encoded, then read
        cache = LatentCache(config, refs, vae, CPU, tmp_path / "latents")
        kept, store, failed = cache.load(lambda _: None, Counter())
        assert [ref.key for ref in kept] == ["2", "3", "5"]
        assert [key for key, _ in failed] == ["0", "1", "4"]
        assert len(store.latents) == len(store.captions) == 3
    none = LatentCache(config, [refs[0], refs[1]], vae, CPU, tmp_path / "latents")
    with pytest.raises(ValueError, match="none of 2 clips decodes; the first: 0: "):
        none.load(lambda _: None, Counter())


def test_a_damaged_caption_is_a_failure_and_ends_a_run_whose_order_it_would_change(
    configure: Configure, tiny_clips: Path, tmp_path: Path
) -> None:
    """Its bytes are checked at every start, not only when the clip is encoded."""
    data = tmp_path / "data"
    shutil.copytree(tiny_clips, data)
    config = configure(tmp_path / "run", data={"train": str(data), "cache_latents": True}, train={"steps": 2})
    assert run(config)
    ref = read_index(data)[3]
    shard = bytearray(ref.shard_path.read_bytes())
    at = shard.index(b"caption", ref.json_offset) + 14
    shard[at] ^= 1
    ref.shard_path.write_bytes(shard)
    with pytest.raises(RuntimeError, match=r"11 clips of .* can be used now, and they are not those that"):
        run(configure(tmp_path / "run", data={"train": str(data), "cache_latents": True}, train={"steps": 4}))
    failed = json.loads((tmp_path / "run" / "data.json").read_text())["dropped"]
    assert [key for key, _ in failed] == [ref.key]
