"""Shards: round trip, the same bytes twice, and every fault as one clear message."""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vidit.data.encode import encode_mp4
from vidit.data.limits import ClipError
from vidit.data.shard_writer import ShardWriter
from vidit.data.shards import index_path, read_clip, read_index
from vidit.data.tar import ShardError

VIDEO = encode_mp4(np.arange(4 * 16 * 16 * 3, dtype=np.uint32).reshape(4, 16, 16, 3).astype(np.uint8), fps=8)
FACTS = {"width": 16, "height": 16, "fps": 8.0, "num_frames": 4}


def video_of(index: int) -> bytes:
    return VIDEO + b"\0\0\0\x09free" + bytes([index])


def write(folder: Path, num_clips: int = 5, **limits: int) -> dict[str, Any]:
    with ShardWriter(folder, **{"max_clips_per_shard": 2, **limits}) as writer:
        for index in range(num_clips):
            writer.add(f"clip-{index:03d}", video_of(index), {"caption": f"clip number {index} ä", **FACTS})
    manifest: dict[str, Any] = json.loads((folder / "dataset.json").read_text())
    return manifest


def without_columns(folder: Path) -> Path:
    """As an earlier version wrote it: rows and a manifest, no columns."""
    manifest = json.loads((folder / "dataset.json").read_text())
    del manifest["columns"]
    (folder / "dataset.json").write_text(json.dumps(manifest))
    (folder / "index.safetensors").unlink()
    return folder


class TestRoundTrip:
    def test_all_clips_come_back(self, tmp_path: Path) -> None:
        manifest = write(tmp_path)
        assert [shard["num_clips"] for shard in manifest["shards"]] == [2, 2, 1]
        data = read_index(tmp_path)
        assert [ref.key for ref in data] == [f"clip-{index:03d}" for index in range(5)]
        for index, ref in enumerate(data):
            assert (ref.num_frames, ref.fps, ref.width, ref.height) == (4, 8.0, 16, 16)
            video, caption, sidecar = read_clip(ref)
            assert video == video_of(index)
            assert caption == f"clip number {index} ä"
            assert ref.caption_chars == len(caption)
            assert sidecar == {"caption": caption, **FACTS}

    def test_same_bytes_twice(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            write(tmp_path / name)
        names = sorted(path.name for path in (tmp_path / "a").iterdir())
        assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
        assert not [name for name in names if name.startswith(".")]
        for name in names:
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    def test_the_manifest_tells_the_truth(self, tmp_path: Path) -> None:
        manifest = write(tmp_path)
        for shard in manifest["shards"]:
            content = (tmp_path / shard["name"]).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (
                shard["num_bytes"],
                shard["sha256"],
            )
        assert manifest["num_clips"] == 5

    def test_members_have_no_date_and_no_owner_of_this_machine(self, tmp_path: Path) -> None:
        write(tmp_path)
        with tarfile.open(tmp_path / "shard-000000.tar") as tar:
            for info in tar:
                assert (info.mtime, info.uid, info.gid, info.mode, info.uname) == (0, 0, 0, 0o444, "vidit")

    def test_the_index_is_what_a_scan_finds(self, tmp_path: Path) -> None:
        write(tmp_path)
        data = read_index(tmp_path)
        without_columns(tmp_path)
        for path in tmp_path.glob("*.jsonl"):
            path.unlink()
        assert read_index(tmp_path) == tuple(
            replace(ref, video_crc32=None, json_crc32=None, video_sha256=None) for ref in data
        )

    def test_the_index_holds_the_crc_of_what_was_added(self, tmp_path: Path) -> None:
        write(tmp_path)
        for index, ref in enumerate(read_index(tmp_path)):
            assert ref.video_crc32 == zlib.crc32(video_of(index))
            caption = ref.shard_path.read_bytes()[ref.json_offset : ref.json_offset + ref.json_size]
            assert ref.json_crc32 == zlib.crc32(caption)
            assert ref.video_sha256 == hashlib.sha256(video_of(index)).hexdigest()

    @pytest.mark.parametrize("lacks", [("video_sha256",), ("video_crc32", "json_crc32", "video_sha256")])
    def test_an_index_of_an_earlier_version_is_read(self, tmp_path: Path, lacks: tuple[str, ...]) -> None:
        write(tmp_path, 2)
        data = read_index(tmp_path)
        without_columns(tmp_path)
        path = index_path(tmp_path / "shard-000000.tar")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        bare = [{name: value for name, value in row.items() if name not in lacks} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in bare))
        assert read_index(tmp_path) == tuple(replace(ref, **dict.fromkeys(lacks)) for ref in data)
        assert [read_clip(ref)[0] for ref in read_index(tmp_path)] == [video_of(0), video_of(1)]

    @pytest.mark.parametrize("allowed", [False, True])
    def test_empty_captions_on_purpose_are_on_record(self, tmp_path: Path, allowed: bool) -> None:
        with ShardWriter(tmp_path, allow_empty_captions=allowed) as writer:
            writer.add("a", VIDEO, {"caption": "", **FACTS})
        assert read_index(tmp_path)[0].allow_empty_caption is allowed
        manifest = json.loads((tmp_path / "dataset.json").read_text())
        assert manifest.pop("allow_empty_captions") is allowed
        (tmp_path / "dataset.json").write_text(json.dumps(manifest))
        assert not read_index(tmp_path)[0].allow_empty_caption, "a manifest that does not say allows none"

    def test_webdataset_reads_what_we_write(self, tmp_path: Path) -> None:
        from webdataset import WebDataset

        write(tmp_path, 2)
        samples = list(WebDataset([str(tmp_path / "shard-000000.tar")], shardshuffle=False))
        assert [sample["__key__"] for sample in samples] == ["clip-000", "clip-001"]
        assert samples[1]["mp4"] == video_of(1)

    def test_shards_close_at_max_bytes(self, tmp_path: Path) -> None:
        manifest = write(tmp_path, 4, max_clips_per_shard=100, max_bytes=1)
        assert [shard["num_clips"] for shard in manifest["shards"]] == [1, 1, 1, 1]

    def test_a_sidecar_without_shape_is_probed(self, tmp_path: Path) -> None:
        with ShardWriter(tmp_path) as writer:
            writer.add("a", VIDEO, {"caption": "x"}, suffix="mov")
        ref = read_index(tmp_path)[0]
        assert (ref.num_frames, ref.width, ref.height, ref.fps, ref.video_suffix) == (4, 16, 16, 8.0, "mov")
        assert read_clip(ref)[2] == {"caption": "x"}


class TestWriterRefuses:
    @pytest.mark.parametrize(
        ("key", "sidecar", "suffix", "reason"),
        [
            ("../up", {"caption": "x"}, "mp4", "is not 1 to 90"),
            ("a.b", {"caption": "x"}, "mp4", "is not 1 to 90"),
            ("", {"caption": "x"}, "mp4", "is not 1 to 90"),
            ("k" * 91, {"caption": "x"}, "mp4", "is not 1 to 90"),
            ("first", {"caption": "x"}, "mp4", "was added before"),
            ("a", {"caption": "x"}, "pkl", "suffix 'pkl'"),
            ("a", {"caption": None}, "mp4", "no caption"),
            ("a", {"caption": "x", "bad": float("nan")}, "mp4", "JSON"),
        ],
    )
    def test_bad_clips(self, tmp_path: Path, key: str, sidecar: dict[str, Any], suffix: str, reason: str) -> None:
        def add_two() -> None:
            with ShardWriter(tmp_path) as writer:
                writer.add("first", VIDEO, {"caption": "x"})
                writer.add(key, VIDEO, sidecar, suffix)

        with pytest.raises(ValueError, match=reason):
            add_two()
        assert list(tmp_path.iterdir()) == []

    def test_a_video_that_cannot_be_probed(self, tmp_path: Path) -> None:
        with pytest.raises(ClipError), ShardWriter(tmp_path) as writer:
            writer.add("a", b"nothing", {"caption": "x"})

    def test_an_empty_data_set(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no clip was added"), ShardWriter(tmp_path):
            pass

    def test_a_folder_in_use(self, tmp_path: Path) -> None:
        write(tmp_path)
        with pytest.raises(ShardError, match=r"already holds dataset\.json"):
            ShardWriter(tmp_path)


class TestDamage:
    def test_no_folder(self, tmp_path: Path) -> None:
        for name in (tmp_path / "gone", "pipe:cat /etc/passwd"):
            with pytest.raises(ShardError, match="is not a folder"):
                read_index(name)

    def test_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ShardError, match=r"holds no \.tar"):
            read_index(tmp_path)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (lambda tar: b"", "empty file"),
            (lambda tar: bytes(10240), "the tar is empty"),
            (lambda tar: b"x" * 2048, "not a whole uncompressed tar"),
            (lambda tar: tar[:700], "unexpected end of data"),
            (lambda tar: tar[: len(tar.rstrip(b"\0")) - 600], "truncated|unexpected end"),
            (lambda tar: tar.rstrip(b"\0"), "unexpected end of data"),
            (
                lambda tar: tar[: tar.index(b"clip-001.json")] + b"junk" + tar[tar.index(b"clip-001.json") + 4 :],
                "byte",
            ),
        ],
    )
    @pytest.mark.parametrize("with_index", [False, True])
    def test_broken_tars(
        self, tmp_path: Path, content: Callable[[bytes], bytes], reason: str, with_index: bool
    ) -> None:
        write(tmp_path, 2)
        (tmp_path / "dataset.json").unlink()
        shard = tmp_path / "shard-000000.tar"
        if not with_index:
            index_path(shard).unlink()
        shard.write_bytes(content(shard.read_bytes()))
        with pytest.raises(ShardError, match=None if with_index else reason) as caught:
            _ = [read_clip(ref) for ref in read_index(tmp_path)]
        assert "shard-000000" in str(caught.value)
        assert "vidit pack" in str(caught.value)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"video_size": 10**9}, "spans bytes"),
            ({"video_offset": 10**9}, "spans bytes"),
            ({"video_offset": 513}, "spans bytes"),
            ({"video_offset": -512}, "video_offset=-512 cannot be"),
            ({"video_size": True}, "video_size=True"),
            ({"num_frames": 0}, "num_frames=0"),
            ({"fps": float("inf")}, "fps=inf"),
            ({"fps": "8"}, "fps='8'"),
            ({"width": 1.5}, "width=1.5"),
            ({"key": 3}, "key=3"),
            ({"key": "other"}, "the index expects other.mp4"),
            ({"video_suffix": "pkl"}, "video_suffix='pkl'"),
            ({"caption_suffix": "pkl"}, "caption_suffix='pkl'"),
            ({"video_crc32": "8"}, "video_crc32='8'"),
            ({"json_crc32": -1}, "json_crc32=-1"),
            ({"video_sha256": "8"}, "video_sha256='8'"),
            ({"extra": 1}, "does not have the fields"),
        ],
    )
    def test_a_wrong_index_row(self, tmp_path: Path, change: dict[str, Any], reason: str) -> None:
        write(tmp_path, 2)
        without_columns(tmp_path)
        path = index_path(tmp_path / "shard-000000.tar")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**row, **change} if row is rows[0] else row) + "\n" for row in rows))
        with pytest.raises(ShardError, match=reason) as caught:
            read_index(tmp_path)
        assert "shard-000000" in str(caught.value)

    @pytest.mark.parametrize(
        ("text", "reason"),
        [("", "is empty"), ("{}\n", "fields"), ("[\n", "line 1 is not JSON"), ("[]\n", "fields")],
    )
    def test_an_index_that_is_none(self, tmp_path: Path, text: str, reason: str) -> None:
        write(tmp_path, 2)
        without_columns(tmp_path)
        index_path(tmp_path / "shard-000000.tar").write_text(text)
        with pytest.raises(ShardError, match=reason):
            read_index(tmp_path)

    def test_an_index_of_another_tar(self, tmp_path: Path) -> None:
        write(tmp_path / "a", 2)
        write(tmp_path / "b", 1)
        tar = (tmp_path / "b" / "shard-000000.tar").read_bytes()
        (tmp_path / "a" / "shard-000000.tar").write_bytes(tar)
        (tmp_path / "a" / "dataset.json").unlink()
        with pytest.raises(ShardError, match=r"spans bytes|the index expects|the index ends"):
            read_index(tmp_path / "a")
        index = index_path(tmp_path / "a" / "shard-000000.tar")
        index.write_text(index.read_text().splitlines(keepends=True)[0])
        assert len(read_index(tmp_path / "a")) == 1

    def test_a_row_left_out(self, tmp_path: Path) -> None:
        write(tmp_path, 2)
        without_columns(tmp_path)
        path = index_path(tmp_path / "shard-000000.tar")
        path.write_text(path.read_text().splitlines(keepends=True)[0])
        with pytest.raises(ShardError, match="the tar goes on"):
            read_index(tmp_path)

    def test_a_tar_that_changes_after_the_index_was_read(self, tmp_path: Path) -> None:
        write(tmp_path, 2)
        ref = read_index(tmp_path)[1]
        content = ref.shard_path.read_bytes()
        ref.shard_path.write_bytes(content[: ref.video_offset + 100])
        with pytest.raises(ShardError, match=r"truncated: clip-001\.mp4 has 100 of"):
            read_clip(ref)
        ref.shard_path.write_bytes(bytes(1024) + content)
        with pytest.raises(ShardError, match="the index expects"):
            read_clip(ref)
        ref.shard_path.unlink()
        with pytest.raises(ShardError, match="cannot be read"):
            read_clip(ref)

    @pytest.mark.parametrize("member", ["video", "json"])
    def test_one_flipped_bit(self, tmp_path: Path, member: str) -> None:
        """Each of them, in the content of either member, is a fault of that clip with both values."""
        write(tmp_path, 2)
        ref, other = read_index(tmp_path)
        content = ref.shard_path.read_bytes()
        offset, size = getattr(ref, f"{member}_offset"), getattr(ref, f"{member}_size")
        for place in (offset, offset + size // 2, offset + size - 1):
            flipped = bytearray(content)
            flipped[place] ^= 1
            ref.shard_path.write_bytes(flipped)
            assert read_index(tmp_path) == (ref, other)
            found = zlib.crc32(flipped[offset : offset + size])
            expected = f"CRC-32 {found:08x}, its index says {getattr(ref, f'{member}_crc32'):08x}"
            with pytest.raises(ClipError, match=expected):
                read_clip(ref)
            assert read_clip(other)[0] == video_of(1)

    def test_the_manifest_is_compared(self, tmp_path: Path) -> None:
        write(tmp_path)
        shard = tmp_path / "shard-000001.tar"
        content = shard.read_bytes()
        shard.write_bytes(content + bytes(512))
        with pytest.raises(ShardError, match=r"bytes, dataset\.json says"):
            read_index(tmp_path)
        shard.unlink()
        with pytest.raises(ShardError, match=r"2 shards are there, dataset\.json lists 3.*shard-000001\.tar"):
            read_index(tmp_path)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "x", "version": 1, "shards": []}', '{"shards": 3}'])
    def test_a_manifest_that_is_none(self, tmp_path: Path, text: str) -> None:
        write(tmp_path)
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(ShardError, match=r"dataset\.json"):
            read_index(tmp_path)

    def test_no_manifest(self, tmp_path: Path) -> None:
        write(tmp_path)
        (tmp_path / "dataset.json").unlink()
        assert len(read_index(tmp_path)) == 5
