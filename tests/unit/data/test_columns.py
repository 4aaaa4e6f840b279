"""The columns of a data set say what its rows say, are held against their hash and their tars, and cost little."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save

from tests.unit.data.test_shards import FACTS, VIDEO, video_of, without_columns, write
from vidit.data.catalog import Catalog
from vidit.data.clip_list import Clips
from vidit.data.clip_ref import IN_INDEX, OPTIONAL
from vidit.data.column_file import MappedColumns
from vidit.data.manifest import COLUMNS, MANIFEST, sha256_of
from vidit.data.remote import Reach
from vidit.data.shard_writer import ShardWriter
from vidit.data.shards import index_path, read_clip, read_index
from vidit.data.tar import ShardError
from vidit.data.texts import CHUNK, Texts
from vidit.train.fingerprint import digest


def table_of(clips: Clips) -> Any:
    return clips.parts[0].table


def changed(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None], hashed: bool = True) -> None:
    """Change the columns and what is said about them; with ``hashed`` the manifest names the new file."""
    path = folder / COLUMNS
    arrays = {name: array.copy() for name, array in load_file(path).items()}
    with safe_open(path, "numpy") as file:
        about = json.loads(file.metadata()["about"])
    change(arrays, about)
    path.write_bytes(save(arrays, {"about": json.dumps(about)}))
    if hashed:
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["columns"] |= {"num_bytes": path.stat().st_size, "sha256": sha256_of(path)}
        (folder / MANIFEST).write_text(json.dumps(manifest))


class TestSameAsRows:
    def test_every_field_of_every_clip(self, tmp_path: Path) -> None:
        write(tmp_path)
        data = read_index(tmp_path)
        assert isinstance(table_of(data).columns, MappedColumns)
        mapped, known = list(data), digest(data)
        rows = [
            json.loads(line)
            for shard in sorted(tmp_path.glob("*.tar"))
            for line in index_path(shard).read_text().splitlines()
        ]
        assert [{name: getattr(ref, name) for name in row} for ref, row in zip(mapped, rows, strict=True)] == rows
        from_rows = read_index(without_columns(tmp_path))
        assert not isinstance(table_of(from_rows).columns, MappedColumns)
        assert from_rows == mapped
        assert digest(from_rows) == known, "what a run is tied to is the clips, not how they were read"

    def test_remote(self, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        write(tmp_path / "set")
        with serve(tmp_path / "set") as web:
            data = read_index(web.url, Reach(cache_dir=str(tmp_path / "cache"), stall_s=10, patience_s=60))
            assert not [name for name, _, _ in web.asked if name.endswith("jsonl")]
            assert [ref.video_sha256 for ref in data] == [ref.video_sha256 for ref in read_index(tmp_path / "set")]
            assert pickle.loads(pickle.dumps(data)) == data
            fates = iter(["ok", "ok", "flip"])  # the manifest and its size, then the columns
            web.mischief = lambda path: next(fates, "ok")
            assert read_index(web.url, Reach(stall_s=10, patience_s=60)).keys[4] == "clip-004", "fetched once more"
            web.mischief = lambda path: "flip" if path.endswith(COLUMNS) else "ok"
            with pytest.raises(ShardError, match=rf"{COLUMNS}: SHA-256 \w+, dataset\.json says"):
                read_index(web.url, Reach(stall_s=10, patience_s=60))


class TestTampered:
    def test_another_content_of_the_same_size(self, tmp_path: Path) -> None:
        write(tmp_path)
        path = tmp_path / COLUMNS
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(ShardError, match=rf"{COLUMNS}: SHA-256 \w+, dataset\.json says \w+; run `vidit pack`"):
            read_index(tmp_path)

    @pytest.mark.parametrize("name", [COLUMNS, "shard-000001.index.jsonl"])
    @pytest.mark.parametrize("what", ["missing", "longer"])
    def test_a_file_that_is_not_as_the_manifest_says(self, tmp_path: Path, name: str, what: str) -> None:
        write(tmp_path)
        path = tmp_path / name
        if what == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes() + b"\n")
        with pytest.raises(ShardError, match=rf"{name}(:| is missing).*dataset\.json (says|lists)"):
            read_index(tmp_path)

    @pytest.mark.parametrize(
        ("name", "value", "reason"),
        [
            ("video_size", 10**9, "spans bytes"),
            ("video_offset", 10**9, "spans bytes"),
            ("video_offset", 513, "spans bytes"),
            ("video_offset", 1 << 61, r"clip 1: video_offset=\d+ cannot be"),
            ("video_offset", -512, "clip 1: video_offset=-512 cannot be"),
            ("json_size", -1, "json_size=-1 cannot be"),
            ("num_frames", 0, "num_frames=0"),
            ("fps", float("nan"), "fps=nan"),
            ("fps", float("inf"), "fps=inf"),
            ("width", -16, "width=-16"),
            ("caption_chars", -1, "caption_chars=-1"),
            ("video_suffix", 200, "video_suffix=200"),
            ("caption_suffix", 1, "caption_suffix=1"),  # mp4, a suffix of videos
            ("video_crc32", -2, "video_crc32=-2"),
            ("json_crc32", 1 << 32, "json_crc32=4294967296"),
            ("key_end", 0, "clip 1: its key is empty or no text"),
            ("key_end", 1000, "its key is empty or no text"),
        ],
    )
    def test_a_value_that_cannot_be_with_a_hash_that_fits(
        self, tmp_path: Path, name: str, value: float, reason: str
    ) -> None:
        write(tmp_path)

        def change(arrays: dict[str, Any], about: dict[str, Any]) -> None:
            assert about["suffixes"] == ["json", "mp4"]
            arrays[name][1] = value

        changed(tmp_path, change)
        with pytest.raises(ShardError, match=reason):
            read_index(tmp_path)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda arrays, about: arrays.pop("fps"), "does not have the columns"),
            (lambda arrays, about: arrays.update(more=arrays["fps"]), "does not have the columns"),
            (lambda arrays, about: arrays.update(fps=arrays["fps"].astype("f4")), "does not have the columns"),
            (lambda arrays, about: arrays.update(fps=arrays["fps"][1:].copy()), "does not have the columns"),
            (lambda arrays, about: about.update(version="2"), "this version reads"),
            (lambda arrays, about: about.update(suffixes=["json", "pkl"]), "video_suffix=1 cannot be"),
            (lambda arrays, about: about.update(suffixes=3), "list of suffixes"),
            (lambda arrays, about: arrays["key"].__setitem__(0, 0xFF), "its key is empty or no text"),
            (lambda arrays, about: arrays["key"].__setitem__(0, ord("x")), "the index expects xlip-000.mp4"),
            (
                lambda arrays, about: [arrays.update({n: a[:-1].copy()}) for n, a in arrays.items() if n != "key"],
                "4 cl",
            ),
        ],
    )
    def test_columns_that_are_none(self, tmp_path: Path, change: Any, reason: str) -> None:
        write(tmp_path)
        changed(tmp_path, change)
        with pytest.raises(ShardError, match=reason):
            read_index(tmp_path)

    def test_a_file_that_is_none(self, tmp_path: Path) -> None:
        write(tmp_path)
        changed(tmp_path, lambda arrays, about: None)
        manifest = json.loads((tmp_path / MANIFEST).read_text())
        (tmp_path / COLUMNS).write_bytes(b"\x80\x04K*.")
        manifest["columns"] |= {"num_bytes": 5, "sha256": sha256_of(tmp_path / COLUMNS)}
        (tmp_path / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(ShardError, match="is no file of columns"):
            read_index(tmp_path)

    def test_a_tar_of_the_same_size_and_another_content(self, tmp_path: Path) -> None:
        write(tmp_path)
        shard = tmp_path / "shard-000001.tar"
        whole = shard.read_bytes()
        for damage in (
            bytes(len(whole)),
            whole.replace(b"clip-002.mp4", b"clip-009.mp4"),
            whole.replace(b"0000444", b"0000644"),
        ):
            shard.write_bytes(damage)
            with pytest.raises(ShardError, match=r"shard-000001\.tar: at byte \d+ the index expects"):
                read_index(tmp_path)

    def test_the_same_key_in_two_shards(self, tmp_path: Path) -> None:
        write(tmp_path, 8, max_clips_per_shard=4)

        def change(arrays: dict[str, Any], about: dict[str, Any]) -> None:
            arrays["key"][5 * len("clip-000") + 7] = ord("1")

        changed(tmp_path, change)
        with pytest.raises(ShardError, match=r"shard-000001\.tar: key 'clip-001' is also in shard-000000\.tar"):
            read_index(tmp_path)


class TestOtherOrder:
    def test_captions_before_all_videos(self, tmp_path: Path) -> None:
        members = [(f"{key}.json", json.dumps({"caption": key, **FACTS}).encode()) for key in "ab"]
        members += [(f"{key}.mp4", VIDEO) for key in "ba"]
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        scanned = read_index(tmp_path)
        rows = [{name: getattr(ref, name) for name in IN_INDEX if name not in OPTIONAL} for ref in scanned]
        index_path(tmp_path / "x.tar").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert read_index(tmp_path) == scanned


class TestList:
    @pytest.fixture(scope="class")
    def clips(self, tmp_path_factory: pytest.TempPathFactory) -> Clips:
        one, other = (tmp_path_factory.mktemp("sets") for _ in range(2))
        write(one)
        write(other, 3)
        return Clips.chained([read_index(one), read_index(other), list(read_index(one)[1:3])])

    @settings(deadline=None)
    @given(start=st.integers(-12, 12), stop=st.integers(-12, 12), step=st.sampled_from([1, 2, -1, 3]), data=st.data())
    def test_slices_and_numbers_are_those_of_a_list(
        self, clips: Clips, start: int, stop: int, step: int, data: st.DataObject
    ) -> None:
        plain = list(clips)
        assert len(clips) == len(plain) == 10
        part = clips[start:stop:step]
        assert list(part) == plain[start:stop:step]
        assert digest(part) == digest(plain[start:stop:step])
        numbers = data.draw(st.lists(st.integers(0, len(plain) - 1)))
        taken = clips.take(np.array(numbers, np.int64))
        assert list(taken) == [plain[number] for number in numbers]
        assert [taken.keys[i] for i in range(len(taken))] == [taken.key(i) for i in range(len(taken))]
        assert taken.column("video_offset").tolist() == [ref.video_offset for ref in taken]
        assert pickle.loads(pickle.dumps(taken)) == taken
        assert [ref for shard, group in taken.by_shard() for ref in group if ref.shard_path == shard] == list(taken)
        assert Clips.of(list(taken)) == taken

    def test_ends(self, clips: Clips) -> None:
        assert clips[-1] == list(clips)[-1]
        for number in (10, -11):
            with pytest.raises(IndexError):
                clips[number]
        assert clips[:0] == ()
        assert clips[:2] != clips[1:3]

    def test_other_orders_and_parts_have_other_digests(self, clips: Clips) -> None:
        found = [digest(clips[a:b]) for a in range(10) for b in range(a + 1, 8)]
        assert len(set(found)) == len(found) - 3, "the first two clips of both sets are the same, in the same shard"


class TestWorkers:
    def test_what_a_worker_is_sent_does_not_grow_with_the_clips(self, tmp_path: Path) -> None:
        sizes = []
        for num in (50, 400):
            with ShardWriter(tmp_path / str(num)) as writer:
                for index in range(num):
                    writer.add(f"clip-{index:03d}", VIDEO, {"caption": "x", **FACTS})
            clips = read_index(tmp_path / str(num))
            chosen = clips.take(np.delete(np.arange(num), [1, 5]))
            sizes.append([len(pickle.dumps(Catalog.plain(each))) for each in (clips, chosen)])
            again = pickle.loads(pickle.dumps(Catalog.plain(chosen)))
            assert again.refs == chosen
            assert again.order(0, "clips", 0).at(7) == Catalog.plain(chosen).order(0, "clips", 0).at(7)
        assert sizes[1][0] - sizes[0][0] < 50
        assert sizes[1][1] - sizes[0][1] < 100, "a bit a clip"

    def test_a_data_set_that_was_packed_anew_meanwhile(self, tmp_path: Path) -> None:
        write(tmp_path)
        sent = pickle.dumps(read_index(tmp_path))
        path = tmp_path / COLUMNS
        path.rename(tmp_path / "old")
        path.write_bytes((tmp_path / "old").read_bytes())
        with pytest.raises(ShardError, match="is not what it was when this run began"):
            pickle.loads(sent)
        path.unlink()
        with pytest.raises(ShardError, match="missing since this run began"):
            pickle.loads(sent)


class TestTexts:
    @given(st.lists(st.text(min_size=1, max_size=40)))
    def test_round_trip_hashes_and_repeats(self, texts: list[str]) -> None:
        packed = Texts.of(texts)
        assert [packed[i] for i in range(len(packed))] == texts
        assert packed.fault() is None
        hashes = packed.hashes(3).tolist()
        assert hashes == [Texts.of([text]).hashes(3).tolist()[0] for text in texts], "whatever stands beside it"
        seen: set[str] = set()
        second = next((i for i, text in enumerate(texts) if text in seen or seen.add(text)), None)
        expected = None if second is None else (texts.index(texts[second]), second)
        assert packed.repeated() == expected

    def test_over_several_chunks(self) -> None:
        texts = [f"clip-{number}" for number in range(2 * CHUNK + 5)]
        packed = Texts.of(texts)
        hashes = packed.hashes(1)
        assert len(np.unique(hashes)) == len(texts)
        assert packed.repeated() is None
        assert Texts.of([*texts, "clip-17", "clip-3"]).repeated() == (17, len(texts))
        shares = np.histogram(hashes / 2.0**64, 64, (0, 1))[0] / len(texts)
        assert abs(shares * 64 - 1).max() < 0.15, "keys that follow one another spread evenly"
        assert not np.array_equal(hashes, packed.hashes(2))


def test_reading_goes_on_after_the_columns_were_mapped(tmp_path: Path) -> None:
    write(tmp_path)
    assert [read_clip(ref)[0] for ref in read_index(tmp_path)] == [video_of(index) for index in range(5)]
