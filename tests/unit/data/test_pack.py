"""Packing: what is kept and why not, the same shards each time, and no folder overwritten unasked."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from vidit.data import pack_verdicts
from vidit.data.candidates import Place
from vidit.data.encode import encode_mp4
from vidit.data.pack import pack
from vidit.data.pack_journal import Examined, examine
from vidit.data.pack_report import PackReport, print_report
from vidit.data.pack_verdicts import Tally
from vidit.data.shards import read_clip, read_index

CLIPS = Path(os.environ.get("VIDIT_TEST_CLIPS") or Path(__file__).parents[3] / "../shared/clips")
needs_clips = pytest.mark.skipif(not CLIPS.is_dir(), reason=f"no test clips at {CLIPS}; set VIDIT_TEST_CLIPS")


def clip(seed: int = 0, num_frames: int = 6, side: int = 32) -> bytes:
    frames = np.random.default_rng(seed).integers(0, 256, (num_frames, side, side, 3), dtype=np.uint8)
    return encode_mp4(frames, fps=8)


def folder_of(root: Path) -> Path:
    """Five good clips with captions from all three places, and one of each kind of bad one."""
    source = root / "source"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "b.mp4").write_bytes(clip(1))
    (source / "b.txt").write_text("from  text\n", encoding="utf-8")
    (source / "a.MP4").write_bytes(clip(2))
    (source / "a.json").write_text(json.dumps({"caption": "from json", "licence": "CC0"}), encoding="utf-8")
    (source / "deep" / "er" / "x y.mp4").write_bytes(clip(3))
    (source / "deep" / "er" / "ü.mp4").write_bytes(clip(4))
    (source / "same.mp4").write_bytes(clip(5))
    (source / "same.mov").write_bytes(clip(6))
    (source / "short.mp4").write_bytes(clip(7, num_frames=2))
    (source / "tiny.mp4").write_bytes(clip(8, side=16))
    (source / "cut.mp4").write_bytes(clip(9)[:3000])
    (source / "mute.mp4").write_bytes(clip(10))
    (source / "._hidden.mp4").write_bytes(b"litter of a file system")
    names = [
        "deep/er/x y.mp4",
        "deep/er/ü.mp4",
        "same.mp4",
        "same.mov",
        "short.mp4",
        "tiny.mp4",
        "cut.mp4",
        "gone.mp4",
    ]
    rows = [{"file": name, "caption": f"list: {name}", "licence": "CC-BY"} for name in names]
    (source / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return source


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(source: Path, out: Path, **options: object) -> PackReport:
    return pack(source, out, **{"min_frames": 4, "min_side": 20, "clips_per_shard": 4, **options})  # type: ignore


class TestFolder:
    def test_what_is_kept_and_what_is_not(self, tmp_path: Path) -> None:
        report = run(folder_of(tmp_path), tmp_path / "out")
        assert sorted(report.kept) == [
            "a.MP4", "b.mp4", "deep/er/x y.mp4", "deep/er/ü.mp4", "same.mov", "same.mp4",
        ]  # fmt: skip
        reasons = dict(report.rejected)
        assert set(reasons) == {"short.mp4", "tiny.mp4", "cut.mp4", "mute.mp4"}
        assert reasons["short.mp4"] == "2 frames, min_frames is 4"
        assert reasons["tiny.mp4"] == "16x16 pixels, min_side is 20"
        assert "truncated" in reasons["cut.mp4"]
        assert "caption is missing" in reasons["mute.mp4"]
        assert report.cleaned == (("b.mp4", ("white_space",)),)
        assert report.captions_without_file == ("gone.mp4",)
        written = json.loads((tmp_path / "out" / "pack_report.json").read_text(encoding="utf-8"))
        assert written["kept"] == list(report.kept)
        assert written["rejected"] == [list(row) for row in report.rejected]

    def test_the_shards_hold_the_files_as_they_were(self, tmp_path: Path) -> None:
        source = folder_of(tmp_path)
        run(source, tmp_path / "out")
        data = read_index(tmp_path / "out")
        keys = [ref.key for ref in data]
        assert keys == sorted(keys)
        assert keys[:2] == ["a", "b"]
        found = {}
        for ref in data:
            video, caption, sidecar = read_clip(ref)
            assert video == (source / sidecar["file"]).read_bytes()
            assert (sidecar["num_frames"], sidecar["width"], sidecar["height"]) == (6, 32, 32)
            found[sidecar["file"]] = (caption, sidecar["origin"])
        assert found["a.MP4"] == ("from json", {"licence": "CC0"})
        assert found["b.mp4"] == ("from text", {})
        assert found["deep/er/ü.mp4"] == ("list: deep/er/ü.mp4", {"licence": "CC-BY"})

    def test_same_bytes_from_any_number_of_workers(self, tmp_path: Path) -> None:
        source = folder_of(tmp_path)
        run(source, tmp_path / "one")
        run(source, tmp_path / "two", workers=2)
        assert content(tmp_path / "one") == content(tmp_path / "two")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "source", "two"]

    def test_running_again(self, tmp_path: Path) -> None:
        source, out = folder_of(tmp_path), tmp_path / "out"
        first = run(source, out)
        before = content(out)
        again = run(source, out)
        assert (first.unchanged, again.unchanged) == (False, True)
        assert content(out) == before
        (source / "b.txt").write_text("another caption", encoding="utf-8")
        with pytest.raises(ValueError, match="holds another data set"):
            run(source, out)
        assert content(out) == before
        run(source, out, overwrite=True, clips_per_shard=100)
        assert len(list(out.glob("*.tar"))) == 1
        assert len(read_index(out)) == 6

    def test_a_damaged_shard_is_not_called_the_same(self, tmp_path: Path) -> None:
        source, out = folder_of(tmp_path), tmp_path / "out"
        run(source, out)
        shard = out / "shard-000000.tar"
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
        with pytest.raises(ValueError, match="holds another data set"):
            run(source, out)

    def test_foreign_files_are_never_removed(self, tmp_path: Path) -> None:
        source, out = folder_of(tmp_path), tmp_path / "out"
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
        with pytest.raises(ValueError, match=r"holds thesis\.txt"):
            run(source, out, overwrite=True)
        assert content(out) == {"thesis.txt": b"years of work"}

    def test_empty_captions_only_on_purpose(self, tmp_path: Path) -> None:
        source = folder_of(tmp_path)
        report = run(source, tmp_path / "out", allow_empty_captions=True)
        assert "mute.mp4" in report.kept
        assert all(ref.allow_empty_caption for ref in read_index(tmp_path / "out"))
        run(source, tmp_path / "strict")
        assert not any(ref.allow_empty_caption for ref in read_index(tmp_path / "strict"))

    def test_wrong_inputs(self, tmp_path: Path) -> None:
        source, out = folder_of(tmp_path), tmp_path / "out"
        with pytest.raises(ValueError, match="is not a folder"):
            run(tmp_path / "gone", out)
        with pytest.raises(ValueError, match="is not a file"):
            run(source, out, captions=tmp_path / "gone.jsonl")
        with pytest.raises(ValueError, match="lies inside"):
            run(source, source / "out")
        with pytest.raises(ValueError, match="min_side=0"):
            run(source, out, min_side=0)
        with pytest.raises(ValueError, match=r"none of 10 files .* min_frames is 99"):
            run(source, out, min_frames=99)
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="holds no video"):
            run(tmp_path / "empty", out)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "source"]

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("{\n", "line 1 is not JSON"),
            ('{"caption": "x"}\n', "line 1 has no `file`"),
            ('{"file": "b.mp4"}\n\n{"file": "b.mp4"}\n', "line 3: b.mp4 was captioned before"),
        ],
    )
    def test_a_malformed_caption_list(self, tmp_path: Path, text: str, reason: str) -> None:
        captions = tmp_path / "captions.jsonl"
        captions.write_text(text)
        with pytest.raises(ValueError, match=reason):
            run(folder_of(tmp_path), tmp_path / "out", captions=captions)

    def test_a_file_that_changes_meanwhile(self, tmp_path: Path) -> None:
        """Its size and time stay, so that only the bytes tell; the next run looks at it again."""
        source, out = folder_of(tmp_path), tmp_path / "out"
        path, before = source / "b.mp4", (source / "b.mp4").stat()

        def swap(tally: Tally) -> None:
            if tally.done == tally.total:
                path.write_bytes(path.read_bytes()[:-1] + b"x")
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

        with pytest.raises(RuntimeError, match=r"b\.mp4 changed while it was packed"):
            run(source, out, clips_per_shard=100, watch=swap)
        assert not out.exists()
        assert "b.mp4" in run(source, out).kept
        assert {read_clip(ref)[0] for ref in read_index(out)} >= {path.read_bytes()}

    def test_the_table(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        print_report(run(folder_of(tmp_path), tmp_path / "out"))
        shown = capsys.readouterr().out
        for part in ("short.mp4", "min_frames is 4", "white_space in 1", "caption without a file: gone.mp4"):
            assert part in shown


@needs_clips
def test_real_clips_keep_their_captions(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (CLIPS / "real" / "clips.jsonl").read_text().splitlines()]
    source = tmp_path / "source"
    source.mkdir()
    for row in rows[:4]:
        (source / row["file"]).write_bytes((CLIPS / "real" / row["file"]).read_bytes())
    pack(source, tmp_path / "out", captions=CLIPS / "real" / "clips.jsonl")
    found = {
        sidecar["file"]: (caption, sidecar) for _, caption, sidecar in map(read_clip, read_index(tmp_path / "out"))
    }
    for row in rows[:4]:
        caption, sidecar = found[row["file"]]
        assert caption == row["caption"]
        assert (sidecar["width"], sidecar["height"], sidecar["num_frames"]) == (
            row["width"], row["height"], row["num_frames"],
        )  # fmt: skip
        assert sidecar["fps"] == pytest.approx(row["fps"], abs=0.01)
        assert sidecar["origin"]["licence"] == row["licence"]


def examine_or_die(place: Place) -> Examined:
    """As a decoder does that crashes on one of the files."""
    if place.path.name == "b.mp4":
        os.kill(os.getpid(), signal.SIGSEGV)
    return examine(place)


def test_a_video_that_crashes_the_decoder_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder_of(tmp_path)
    monkeypatch.setattr(pack_verdicts, "examine", examine_or_die)
    report = run(source, tmp_path / "out", workers=2)
    assert ("b.mp4", "decoding it ended the process, twice: the decoder crashed, or had too little memory") in [
        (name, reason) for name, reason in report.rejected
    ]
    monkeypatch.undo()
    assert "b.mp4" in run(source, tmp_path / "out", workers=2, overwrite=True).kept, "another try may find it good"
