"""Data sets behind a URL: bit-equal to local ones whatever the server does, and clear where it cannot be."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from vidit.config import RunConfig
from vidit.data.catalog import Catalog
from vidit.data.limits import ClipError, ShardError, StorageError
from vidit.data.loader import MicroBatches, batches
from vidit.data.remote import Reach, RemoteFile
from vidit.data.shards import ClipRef, expect_clips, read_clip, read_index
from vidit.data.storage import folder_of

Serve = Callable[[Path], Any]
QUICK = Reach(stall_s=0.3, patience_s=20)
FATES = ("drop", "reset", "stall", "truncate", "503", "429", "flip")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def spread(refs: Sequence[ClipRef]) -> list[tuple[Any, ...]]:
    return [(ref.shard_path.name, ref.key, ref.video_offset, ref.video_crc32, ref.allow_empty_caption) for ref in refs]


@pytest.fixture
def in_memory(tiny_clips: Path) -> str:
    system = fsspec.filesystem("memory")
    for path in tiny_clips.iterdir():
        system.pipe_file(f"/clips/{path.name}", path.read_bytes())
    return "memory://clips/"


class TestEqualToLocal:
    def test_index_clips_and_fingerprint(self, in_memory: str, tiny_clips: Path) -> None:
        local, remote = read_index(tiny_clips), read_index(in_memory)
        assert spread(remote) == spread(local)
        assert [read_clip(ref) for ref in remote] == [read_clip(ref) for ref in local]
        assert pickle.loads(pickle.dumps(remote)) == remote

    def test_an_epoch_over_a_bad_line(
        self, serve: Serve, chaos: Any, configure: Callable[..., RunConfig], tiny_clips: Path
    ) -> None:
        config = configure(data={"num_workers": 0})
        local = list(batches(MicroBatches(config, Catalog.plain(read_index(tiny_clips)), None, 3), 0, 8))
        with serve(tiny_clips) as web:
            # An index has no checksum of its own, so that only clips are flipped.
            web.mischief = chaos(3, 0.3, FATES[:-1])
            refs = read_index(web.url, QUICK)
            web.mischief = chaos(4, 0.4, FATES[:-1])
            remote = list(batches(MicroBatches(config, Catalog.plain(refs), None, 3), 0, 8))
            assert {*FATES[:-1], "ok"} <= set(web.done), "each kind of failure was met"
        assert sum(len(batch.keys) for batch in remote) == 16
        for one, other in zip(local, remote, strict=True):
            assert (one.keys, one.rows, other.skipped) == (other.keys, other.rows, [])
            assert torch.equal(one.clips.pixels, other.clips.pixels)


class TestRetries:
    def test_a_broken_answer_goes_on_where_it_broke_off(self, serve: Serve, tmp_path: Path) -> None:
        (tmp_path / "a.tar").write_bytes(bytes(range(256)) * 64)
        with serve(tmp_path) as web:
            fates = iter(["truncate", "truncate", "ok"])
            web.mischief = lambda path: next(fates, "ok")
            folder = folder_of(web.url, QUICK)
            assert (folder / "a.tar").read_range(100, 8000) == (tmp_path / "a.tar").read_bytes()[100:8100]
            assert web.asked == [("a.tar", 100, 8099), ("a.tar", 4100, 8099), ("a.tar", 6100, 8099)]

    @pytest.mark.parametrize(("fate", "reason"), [("stall", "nothing came for"), ("503", "HTTP 503"), ("drop", "")])
    def test_a_dead_server_is_given_up_in_time(self, serve: Serve, tmp_path: Path, fate: str, reason: str) -> None:
        with serve(tmp_path) as web:
            web.mischief = lambda path: fate
            began = time.monotonic()
            with pytest.raises(
                StorageError, match=rf"dataset.json: its size cannot be read: \d+ tries in . s, .*{reason}"
            ):
                read_index(web.url, Reach(stall_s=0.3, patience_s=1.5))
            assert time.monotonic() - began < 3
            assert len(web.done) > 1

    def test_a_run_ends_with_the_error_when_the_server_dies(
        self, serve: Serve, configure: Callable[..., RunConfig], tiny_clips: Path
    ) -> None:
        with serve(tiny_clips) as web:
            data = {"num_workers": 1, "train": web.url, "stall_s": 0.5, "patience_s": 1.0}
            refs = read_index(web.url, Reach(stall_s=0.5, patience_s=1.0))
            web.mischief = lambda path: "503"
            with pytest.raises(StorageError, match=r"the last: HTTP 503 .*raise data\.patience_s=1"):
                list(batches(MicroBatches(configure(data=data), Catalog.plain(refs), None, 3), 0, 4))

    def test_damage_on_the_way_is_read_again_and_damage_that_stays_is_the_clips(
        self, serve: Serve, tiny_clips: Path, tmp_path: Path
    ) -> None:
        with serve(tiny_clips) as web:
            reach = Reach(cache_dir=str(tmp_path), stall_s=10, patience_s=60)
            ref, other = read_index(web.url, reach)[:2]
            fates = iter(["flip", "ok"])
            web.mischief = lambda path: next(fates, "ok")
            assert read_clip(ref) == read_clip(read_index(tiny_clips)[0])
            assert read_clip(ref)[0], "the second, whole answer is what the cache holds"
            web.mischief = lambda path: "flip"
            with pytest.raises((ClipError, ShardError), match=r"damaged|not valid"):
                read_clip(other)


class TestCache:
    def test_what_was_read_once_is_not_asked_for_again(self, serve: Serve, tiny_clips: Path, tmp_path: Path) -> None:
        reach = Reach(cache_dir=str(tmp_path), stall_s=10, patience_s=60)
        with serve(tiny_clips) as web:
            first = [read_clip(ref) for ref in read_index(web.url, reach)]
            web.asked.clear()
            assert [read_clip(ref) for ref in read_index(web.url, reach)] == first
            assert {name for name, _, _ in web.asked} == {"dataset.json"}, "which tells whether all is as it was"

    def test_a_data_set_that_was_packed_anew_is_noticed(self, serve: Serve, tiny_clips: Path, tmp_path: Path) -> None:
        reach = Reach(cache_dir=str(tmp_path / "cache"), stall_s=10, patience_s=60)
        shutil.copytree(tiny_clips, tmp_path / "set")
        with serve(tmp_path / "set") as web:
            before = read_index(web.url, reach)
            manifest = tmp_path / "set" / "dataset.json"
            manifest.write_text(
                manifest.read_text().replace('"allow_empty_captions": false', '"allow_empty_captions": true')
            )
            web.asked.clear()
            assert read_index(web.url, reach)[0].allow_empty_caption is not before[0].allow_empty_caption
            assert any(name == "index.safetensors" for name, _, _ in web.asked)


class TestEarly:
    def test_a_micro_batch_is_one_wait_and_one_request_a_clip(self, serve: Serve, tiny_clips: Path) -> None:
        with serve(tiny_clips) as web:
            refs = read_index(web.url, QUICK)
            web.asked.clear()
            slow = 0.15
            web.mischief = lambda path: time.sleep(slow) or "ok"  # type: ignore[func-returns-value]
            began = time.monotonic()
            expect_clips(refs)
            found = [read_clip(ref) for ref in refs]
            assert time.monotonic() - began < slow * len(refs) / 2
            assert len(web.asked) == len(refs) == 16
        assert found == [read_clip(ref) for ref in read_index(tiny_clips)]

    def test_an_error_belongs_to_its_clip(self, serve: Serve, tiny_clips: Path) -> None:
        with serve(tiny_clips) as web:
            refs = read_index(web.url, QUICK)
            web.mischief = lambda path: "404"
            expect_clips(refs[:2])
            web.mischief = lambda path: "ok"
            time.sleep(0.3)
            expect_clips(refs[1:3])
            assert read_clip(refs[0])[0], "forgotten, and read anew"


class TestRefused:
    @pytest.mark.parametrize(
        ("url", "reason"),
        [
            ("file:///etc", "file:// is not read"), ("pipe:cat://x", "is not read"), ("local://a", "is not read"),
            ("simplecache::s3://a/b", "is not read"), ("s3://a/b::file:///etc", "not the address"),
            ("github://a:b@/", "is not read"), ("https://a/b?token=1", "has no"), ("https://a/../b", "has no"),
            ("https://me:secret@a/b", "no password"), ("http://", "not the address"),
        ],
    )  # fmt: skip
    def test_addresses(self, url: str, reason: str) -> None:
        with pytest.raises(ValueError, match=reason) as caught:
            read_index(url)
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize("name", ["../x.tar", "/etc/passwd", "file:///etc/passwd", "shard-1.tar", "dataset.json"])
    def test_names_in_a_manifest(self, tmp_path: Path, tiny_clips: Path, name: str) -> None:
        manifest = json.loads((tiny_clips / "dataset.json").read_text())
        manifest["shards"][0]["name"] = name
        fsspec.filesystem("memory").pipe_file("/evil/dataset.json", json.dumps(manifest).encode())
        with pytest.raises(ShardError, match="which is no shard's name"):
            read_index("memory://evil")

    def test_a_package_that_is_missing_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed
        with pytest.raises(ValueError, match=r'gs:// needs the package gcsfs: pip install -e "\.\[gs\]"'):
            read_index("gs://bucket/clips")

    @pytest.mark.parametrize(
        ("fate", "reason"),
        [("whole", "ignores byte ranges"), ("redirect", "cannot be opened"), ("404", "HTTP 404"), ("403", "HTTP 403")],
    )
    def test_answers_that_no_other_try_would_mend(self, serve: Serve, tiny_clips: Path, fate: str, reason: str) -> None:
        with serve(tiny_clips) as web:
            web.mischief = lambda path: fate
            with pytest.raises(ShardError, match=reason):
                read_index(web.url, QUICK)
            assert web.done == [fate]

    def test_a_shard_of_another_size_and_a_range_without_end(self, in_memory: str, tiny_clips: Path) -> None:
        system = fsspec.filesystem("memory")
        shard = next(tiny_clips.glob("*.tar"))
        system.pipe_file(f"/clips/{shard.name}", shard.read_bytes() + bytes(512))
        with pytest.raises(ShardError, match=r"bytes, dataset\.json says"):
            read_index(in_memory)
        with pytest.raises(ShardError, match="exceed the limit"):
            RemoteFile(folder_of("memory://clips", Reach()), shard.name).read_range(0, 1 << 40)  # type: ignore[arg-type]
