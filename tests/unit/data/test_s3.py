"""Data sets in an object store, over the protocol of S3: a server of it on this machine, and s3fs as users have it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3fs
import torch
from moto.server import ThreadedMotoServer

from vidit.config import RunConfig
from vidit.data.catalog import Catalog
from vidit.data.limits import ShardError
from vidit.data.loader import MicroBatches, batches
from vidit.data.remote import Reach
from vidit.data.shards import read_clip, read_index

Configure = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def bucket(tiny_clips: Path) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as environment:
        for name, value in settings.items():
            environment.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        system = s3fs.S3FileSystem()
        system.mkdir("clips")
        for path in tiny_clips.iterdir():
            system.pipe_file(f"clips/tiny/{path.name}", path.read_bytes())
        yield "s3://clips/tiny"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_index_and_clips_are_those_of_the_folder(bucket: str, tiny_clips: Path) -> None:
    local, remote = read_index(tiny_clips), read_index(bucket)
    assert [ref.key for ref in remote] == [ref.key for ref in local]
    assert [read_clip(ref) for ref in remote] == [read_clip(ref) for ref in local]


def test_an_epoch_through_the_cache(bucket: str, tiny_clips: Path, configure: Configure, tmp_path: Path) -> None:
    """Read in this process: that of a worker has the environment of whoever began first."""
    found = []
    for place in (tiny_clips, bucket):
        data = {"train": str(place), "num_workers": 0}
        data |= {"cache_dir": str(tmp_path / "cache")} if place == bucket else {}
        refs = read_index(place, Reach(cache_dir=data.get("cache_dir")))
        found.append(list(batches(MicroBatches(configure(data=data), Catalog.plain(refs), None, 3), 0, 4)))
    for one, other in zip(*found, strict=True):
        assert (one.keys, other.skipped) == (other.keys, [])
        assert torch.equal(one.clips.pixels, other.clips.pixels)
    assert any((tmp_path / "cache").rglob("*"))


def test_what_is_not_there_is_told_at_once(bucket: str) -> None:
    for place in ("s3://clips/none", "s3://nobody/tiny"):
        with pytest.raises(ShardError, match=rf"{place}/dataset\.json"):
            read_index(place, Reach(stall_s=5, patience_s=30))
