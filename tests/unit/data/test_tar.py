"""Tars made by others: read as they are, or refused whole with one clear message."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vidit.data.encode import encode_mp4
from vidit.data.shards import build_index, read_clip, read_index
from vidit.data.tar import Limits, ShardError, scan

VIDEO = encode_mp4(np.zeros((4, 16, 16, 3), np.uint8), fps=8)


def tar_of(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if not isinstance(name, tarfile.TarInfo):
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


class TestForeignTars:
    SIDECAR = json.dumps({"caption": "from json"}).encode()

    def test_txt_json_folders_and_long_names(self, tmp_path: Path) -> None:
        long = "part/" + "x" * 150
        folder, _ = special("./part", tarfile.DIRTYPE)
        tar_of(
            tmp_path / "a.tar",
            [
                (folder, b""),
                ("./part/a.MP4", VIDEO),
                ("./part/a.txt", "from text ä".encode()),
                (f"{long}.mp4", VIDEO),
                (f"{long}.json", self.SIDECAR),
                ("part/ünïcode.json", json.dumps({"duration": 3}).encode()),
                ("part/ünïcode.txt", b"both"),
                ("part/ünïcode.webm", VIDEO),
            ],
        )
        data = read_index(tmp_path)
        assert [ref.key for ref in data] == ["part/a", long, "part/ünïcode"]
        assert [read_clip(ref)[:2] for ref in data] == [
            (VIDEO, "from text ä"),
            (VIDEO, "from json"),
            (VIDEO, "both"),
        ]
        assert data[0].num_frames == 4
        assert not list(tmp_path.glob("*.jsonl"))

    @pytest.mark.parametrize("options", [{"format": tarfile.GNU_FORMAT}, {"format": tarfile.PAX_FORMAT}])
    def test_formats(self, tmp_path: Path, options: dict[str, Any]) -> None:
        tar_of(tmp_path / "a.tar", [("a" * 120 + ".mp4", VIDEO), ("a" * 120 + ".txt", b"x")], **options)
        assert read_clip(read_index(tmp_path)[0])[1] == "x"

    @pytest.mark.parametrize(
        ("member", "reason"),
        [
            (special("a.mp4", tarfile.SYMTYPE, "/etc/passwd"), r"'a\.mp4' is refused: it is a link"),
            (special("a.json", tarfile.LNKTYPE, "b.json"), "it is a link"),
            (special("a.mp4", tarfile.CHRTYPE), "a device"),
            (special("a.mp4", tarfile.FIFOTYPE), "special file"),
            (special("a.mp4", tarfile.CONTTYPE), "special file"),
            (("/etc/a.mp4", VIDEO), "absolute path"),
            (("../a.mp4", VIDEO), "leads out"),
            (("b/../../a.mp4", VIDEO), "leads out"),
            (("c:\\a.mp4", VIDEO), "leads out"),
            (("pipe:touch x.mp4", VIDEO), "an address"),
            (("a\n.mp4", VIDEO), "control characters"),
            (("a.pkl", b"x"), "suffix 'pkl' is not one of"),
            (("a.pth", b"x"), "suffix 'pth'"),
            (("a.mp4.gz", b"x"), "suffix 'gz'"),
            (("noname", b"x"), "suffix 'noname'"),
            (("n" * 300 + ".mp4", VIDEO), "304 characters, the limit is 240"),
            (("a.json", b" " * 5000), "5000 bytes, the limit is 4000"),
            (("a.mp4", bytes(20_000)), "20000 bytes, the limit is 10000"),
        ],
    )
    def test_malicious_members(self, tmp_path: Path, member: tuple[Any, bytes], reason: str) -> None:
        path = tar_of(tmp_path / "bad.tar", [("ok.mp4", VIDEO), ("ok.json", self.SIDECAR), member])
        with pytest.raises(ShardError, match=reason) as caught:
            scan(path, Limits(max_caption_bytes=4000, max_video_bytes=10_000))
        assert str(path) in str(caught.value)

    def test_a_header_that_claims_a_gigabyte(self, tmp_path: Path) -> None:
        info = tarfile.TarInfo("pax")
        info.type, info.size = tarfile.XHDTYPE, 1 << 30
        path = tmp_path / "a.tar"
        path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + bytes(4096))
        with pytest.raises(ShardError, match="a header of 1073741824 bytes"):
            build_index(path)

    @pytest.mark.parametrize(
        ("members", "reason"),
        [
            ([("a.json", SIDECAR)], "clip 'a' has 0 videos"),
            ([("a.mp4", VIDEO), ("a.mov", VIDEO), ("a.txt", b"x")], "clip 'a' has 2 videos"),
            ([("a.mp4", VIDEO)], "neither a .json nor a .txt"),
            ([("a.mp4", VIDEO), ("a.mp4", VIDEO)], "is there twice"),
            ([("a.mp4", VIDEO), ("a.json", b"{")], "not valid UTF-8 text or JSON"),
            ([("a.mp4", VIDEO), ("a.json", b"[" * 100_000)], "not valid UTF-8 text or JSON"),
            ([("a.mp4", VIDEO), ("a.txt", b"\xff")], "not valid UTF-8 text or JSON"),
            ([("a.mp4", VIDEO), ("a.json", b"[]")], "no `caption`"),
            ([("a.mp4", VIDEO), ("a.json", b'{"caption": 3}')], "no `caption`"),
            ([("a.mp4", b"broken"), ("a.txt", b"x")], "a.mp4: does not open"),
            ([], "empty"),
        ],
    )
    def test_clips_that_are_not_whole(self, tmp_path: Path, members: list[Any], reason: str) -> None:
        tar_of(tmp_path / "a.tar", members)
        with pytest.raises(ShardError, match=reason) as caught:
            read_index(tmp_path)
        assert "a.tar" in str(caught.value)

    def test_the_same_key_in_two_shards(self, tmp_path: Path) -> None:
        for name in ("a.tar", "b.tar"):
            tar_of(tmp_path / name, [("a.mp4", VIDEO), ("a.txt", b"x")])
        with pytest.raises(ShardError, match=r"b\.tar: key 'a' is also in a\.tar"):
            read_index(tmp_path)
