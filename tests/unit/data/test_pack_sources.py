"""Where videos to pack come from: tables of every kind, tars of others, and what is refused."""

from __future__ import annotations

import csv
import datetime
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from vidit.data.encode import encode_mp4
from vidit.data.pack import pack
from vidit.data.shards import read_clip, read_index


def clip(seed: int = 0) -> bytes:
    frames = np.random.default_rng(seed).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    return encode_mp4(frames, fps=8)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A folder with three videos, one of them elsewhere, and one that no table names."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for seed, name in enumerate(("a.mp4", "b.MP4", "spare.mp4")):
        (folder / name).write_bytes(clip(seed))
    (tmp_path / "far.mp4").write_bytes(clip(9))
    return folder


def found_in(out: Path) -> dict[str, tuple[str, object, bytes]]:
    """File -> (caption, origin, video)."""
    found = {}
    for ref in read_index(out):
        video, caption, sidecar = read_clip(ref)
        found[sidecar["file"]] = caption, sidecar["origin"], video
    return found


def write_table(path: Path, rows: list[dict[str, object]]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
class TestTables:
    def test_rows_become_clips(self, videos: Path, tmp_path: Path, kind: str) -> None:
        far = str(tmp_path / "far.mp4")
        rows = [
            {"file": "a.mp4", "caption": 'one, "two"\nthree', "licence": "CC0", "views": 7},
            {"file": "./b.MP4", "caption": "ü", "licence": "", "views": 8},
            {"file": far, "caption": "far", "licence": "x", "views": 9},
            {"file": "gone.mp4", "caption": "gone", "licence": "x", "views": 9},
            {"file": "a.gif", "caption": "gif", "licence": "x", "views": 9},
        ]
        write_table(videos / f"table.{kind}", rows)
        report = pack(videos / f"table.{kind}", tmp_path / "out")
        seven = 7 if kind in ("jsonl", "parquet") else "7"
        found = found_in(tmp_path / "out")
        assert set(found) == {"a.mp4", "b.MP4", far}
        assert found["a.mp4"] == ('one, "two" three', {"licence": "CC0", "views": seven}, clip(0))
        assert found["b.MP4"][0] == "ü"
        assert found[far][2] == clip(9)
        reasons = dict(report.rejected)
        assert "no such file" in reasons["gone.mp4"]
        assert "suffix is not one of" in reasons["a.gif"]

    def test_columns_are_chosen(self, videos: Path, tmp_path: Path, kind: str) -> None:
        table = videos / f"table.{kind}"
        write_table(table, [{"path": "a.mp4", "text": "long", "caption": "short"}])
        with pytest.raises(ValueError, match=r"1 has no `file`|2 has no `file`"):
            pack(table, tmp_path / "out")
        with pytest.raises(ValueError, match="no column `prose`"):
            pack(table, tmp_path / "out", file_column="path", caption_column="prose")
        pack(table, tmp_path / "out", file_column="path", caption_column="text")
        assert found_in(tmp_path / "out")["a.mp4"][:2] == ("long", {"caption": "short"})

    def test_a_table_of_captions_for_a_folder(self, videos: Path, tmp_path: Path, kind: str) -> None:
        write_table(tmp_path / f"table.{kind}", [{"name": "a.mp4", "caption": "a"}, {"name": "x.mp4", "caption": "x"}])
        report = pack(videos, tmp_path / "out", captions=tmp_path / f"table.{kind}", file_column="name")
        assert report.kept == ("a.mp4",)
        assert report.captions_without_file == ("x.mp4",)
        assert len(report.rejected) == 2

    def test_a_file_twice(self, videos: Path, tmp_path: Path, kind: str) -> None:
        write_table(videos / f"table.{kind}", [{"file": "a.mp4", "caption": "a"}, {"file": "./a.mp4", "caption": "b"}])
        with pytest.raises(ValueError, match=r"a\.mp4 was captioned before"):
            pack(videos / f"table.{kind}", tmp_path / "out")


class TestOneKind:
    def test_parquet_holds_what_json_cannot(self, videos: Path, tmp_path: Path) -> None:
        day = datetime.date(2026, 1, 2)
        row = {
            "file": "a.mp4",
            "caption": b"caf\xe9",
            "day": day,
            "score": float("nan"),
            "hash": b"\1\2",
            "tags": ["x"],
        }
        write_table(videos / "t.parquet", [row, {**row, "file": "b.MP4", "caption": None}])
        report = pack(videos / "t.parquet", tmp_path / "out")
        caption, origin, _ = found_in(tmp_path / "out")["a.mp4"]
        assert caption == "caf\ufffd"
        assert origin == {"day": "2026-01-02", "score": None, "hash": "0102", "tags": ["x"]}
        assert "caption is missing" in dict(report.rejected)["b.MP4"]

    def test_parquet_without_its_extra(self, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (videos / "t.parquet").write_bytes(b"PAR1")
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(RuntimeError, match=r'pip install -e "\.\[parquet\]"'):
            pack(videos / "t.parquet", tmp_path / "out")

    @pytest.mark.parametrize(
        ("name", "text", "reason"),
        [
            ("t.csv", b"file,caption,caption\na.mp4,one,two\n", "has 2 columns named 'caption'; rename one"),
            ("t.csv", b"file;caption\na.mp4;one\n", "is separated by semicolons; write commas"),
            ("t.csv", b"file,caption\na.mp4,one, two\n", "line 2 has 3 cells, its header has 2"),
            ("t.csv", b'file,caption\na.mp4,"one\n', "line 2 is not CSV"),
            ("t.csv", b"", "has no rows"),
            ("t.csv", b"file,caption\n,x\n", "line 2 has no `file`"),
            ("t.jsonl", b"[1]\n", "line 1 is not an object"),
            ("t.jsonl", b"[" * 100_000, "line 1 is not JSON"),
            ("t.parquet", b"file,caption\n", "is not a Parquet file"),
        ],
    )
    def test_malformed(self, videos: Path, tmp_path: Path, name: str, text: bytes, reason: str) -> None:
        if name.endswith("parquet"):
            pytest.importorskip("pyarrow")
        (videos / name).write_bytes(text)
        with pytest.raises(ValueError, match=reason):
            pack(videos / name, tmp_path / "out")
        assert not list(tmp_path.glob(".*"))

    def test_text_that_utf8_cannot_hold(self, videos: Path, tmp_path: Path) -> None:
        """A file name with a stray byte, and half a character and a NaN in a JSON line, as crawled tables have them."""
        os.rename(os.fsencode(videos / "spare.mp4"), os.fsencode(videos) + b"/caf\xe9.mp4")  # noqa: PTH104
        (videos / "caf\udce9.txt").write_text("coffee")
        row = '{"file": "a.mp4", "caption": "half \\ud83d", "title": "\\ud83d", "score": NaN}\n'
        (videos / "clips.jsonl").write_text(row)
        pack(videos, tmp_path / "out")
        found = found_in(tmp_path / "out")
        assert found["a.mp4"][1] == {"title": "\\ud83d", "score": None}
        assert found["caf\\udce9.mp4"][0] == "coffee"


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(
    ("beside", "column", "caption"),
    [
        ({"a.txt": b"text"}, None, "text"),
        ({"a.TXT": b"text"}, None, "text"),
        ({"a.json": b'{"caption": "json"}', "a.txt": b"text"}, None, "json"),
        ({"a.json": b'{"caption": "json"}', "a.txt": b""}, None, "json"),
        ({"a.json": b'{"caption": " "}', "a.txt": b"text"}, None, "text"),
        ({"a.json": b"{broken", "a.txt": b"text"}, None, "text"),
        ({"a.json": b'{"caption": "json", "alt": "other"}'}, "alt", "other"),
    ],
)
def test_captions_beside_a_video_are_read_alike_in_folders_and_tars(
    tmp_path: Path, beside: dict[str, bytes], column: str | None, caption: str
) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(clip(1))
    for name, content in beside.items():
        (tmp_path / "videos" / name).write_bytes(content)
    pack(tmp_path / "videos", tmp_path / "from_folder", caption_column=column)
    assert [found[0] for found in found_in(tmp_path / "from_folder").values()] == [caption]
    if "a.TXT" not in beside:  # in a tar a suffix is spelt as WebDataset spells it
        write_tar(tmp_path / "0.tar", {"a.mp4": clip(1), **beside})
        pack(tmp_path / "0.tar", tmp_path / "from_tar", caption_column=column)
        assert [found[0] for found in found_in(tmp_path / "from_tar").values()] == [caption]


class TestTars:
    def test_tars_as_video2dataset_writes_them(self, tmp_path: Path) -> None:
        folder = tmp_path / "tars"
        folder.mkdir()
        first = {
            "000000001.mp4": clip(1),
            "000000001.txt": b"from text",
            "000000001.json": json.dumps({"caption": "from json", "url": "https://x", "alt": "alt text"}).encode(),
            "000000002.mp4": clip(2),
            "000000002.txt": b"caf\xe9",
            "000000002.json": b"{broken",
            "000000003.mp4": clip(3)[:900],
            "000000003.txt": b"cut",
            "000000004.txt": b"no video",
            "000000005.mp4": clip(5),
        }
        write_tar(folder / "00000.tar", first)
        write_tar(folder / "00001.tar", {"000000001.mp4": clip(6), "000000001.txt": b"same key"})
        write_tar(folder / "00002.tar", {"../up.mp4": clip(7)})
        report = pack(folder, tmp_path / "out", workers=2)
        found = found_in(tmp_path / "out")
        assert found["00000.tar/000000001.mp4"] == (
            "from json", {"url": "https://x", "alt": "alt text"}, clip(1),
        )  # fmt: skip
        assert found["00000.tar/000000002.mp4"] == ("caf\ufffd", {}, clip(2))
        assert found["00001.tar/000000001.mp4"] == ("same key", {}, clip(6))
        assert len(found) == 3
        reasons = dict(report.rejected)
        assert "video track is empty" in reasons["00000.tar/000000003.mp4"]
        assert "0 videos" in reasons["00000.tar/000000004"]
        assert "caption is missing" in reasons["00000.tar/000000005.mp4"]
        assert "leads out of the shard" in reasons["00002.tar"]
        pack(folder / "00000.tar", tmp_path / "one", caption_column="alt")
        assert found_in(tmp_path / "one")["00000.tar/000000001.mp4"][0] == "alt text"

    def test_what_vidit_packed_can_be_packed_again(self, videos: Path, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (videos / f"{name}.txt").write_text(name)
        pack(videos, tmp_path / "first")
        pack(tmp_path / "first", tmp_path / "second")
        again = found_in(tmp_path / "second")
        assert sorted(caption for caption, _, _ in again.values()) == ["a", "b"]


def test_options_without_effect(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("file,caption\nvideos/a.mp4,x\n")
    write_tar(tmp_path / "t.tar", {"a.mp4": clip(), "a.txt": b"x"})
    for source, options, name in (
        (videos, {"file_column": "path"}, "--file-column path"),
        (tmp_path / "t.csv", {"captions": tmp_path / "t.csv"}, "--captions"),
        (tmp_path / "t.tar", {"file_column": "path"}, "--file-column"),
    ):
        with pytest.raises(ValueError, match=rf"{name}.*has no effect"):
            pack(source, tmp_path / "out", **options)  # type: ignore[arg-type]
    (videos / "x.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="both tars and videos"):
        pack(videos, tmp_path / "out")
    with pytest.raises(ValueError, match="not a folder, nor a file that ends in"):
        pack(videos / "a.mp4", tmp_path / "out")


def test_a_broken_link_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "z.mp4").symlink_to(tmp_path / "gone.mp4")
    with pytest.raises(ValueError, match=r"z\.mp4: no such file: a broken link"):
        pack(tmp_path / "videos", tmp_path / "out")
