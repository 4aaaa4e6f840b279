"""Packing that goes on after it was cut off: the same bytes as in one go, nothing decoded or written a second time."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from vidit.data.encode import encode_mp4
from vidit.data.pack import pack
from vidit.data.pack_progress import progress
from vidit.data.pack_report import PackReport
from vidit.data.pack_verdicts import Tally
from vidit.data.shards import read_index

NUM = 11


def clip(seed: int) -> bytes:
    return encode_mp4(np.random.default_rng(seed).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8), fps=8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Ten good clips and one that does not decode."""
    folder = tmp_path / "source"
    folder.mkdir()
    for index in range(NUM):
        (folder / f"{index:02d}.mp4").write_bytes(clip(index))
        (folder / f"{index:02d}.txt").write_text(f"clip {index}")
    (folder / "03.mp4").write_bytes(b"no video")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(source: Path, out: Path, watch: Callable[[Tally], None] = lambda _: None, **options: object) -> PackReport:
    return pack(source, out, watch=watch, **{"clips_per_shard": 2, **options})  # type: ignore[arg-type]


class Counter:
    """What the last run decoded; with ``stop`` it is cut off after so many files."""

    def __init__(self, stop: int = -1) -> None:
        self.stop, self.decoded = stop, 0

    def __call__(self, tally: Tally) -> None:
        self.decoded = tally.decoded
        if tally.done == self.stop:
            raise KeyboardInterrupt


@pytest.fixture
def expected(source: Path, tmp_path: Path) -> dict[str, bytes]:
    run(source, tmp_path / "expected")
    return content(tmp_path / "expected")


@pytest.mark.parametrize("stop", range(1, NUM + 1))
def test_every_place_to_be_cut_off(source: Path, tmp_path: Path, expected: dict[str, bytes], stop: int) -> None:
    out, stage = tmp_path / "out", tmp_path / ".out.partial" / "data"
    with pytest.raises(KeyboardInterrupt):
        run(source, out, Counter(stop))
    assert not out.exists()
    shards = {path.name: path.stat().st_ino for path in stage.glob("*.tar")}
    # The fifth file is the fourth clip, and a shard of two is written when the clip after it is known.
    num_clips = stop - 1 - (stop > 4)
    assert len(shards) == max(0, (num_clips - 1) // 2)
    counter = Counter()
    run(source, out, counter)
    assert counter.decoded == NUM - stop
    assert content(out) == expected
    assert {name: (out / name).stat().st_ino for name in shards} == shards, "they were moved, not written again"
    assert not stage.parent.exists()


def test_what_no_longer_holds_is_done_again(source: Path, tmp_path: Path) -> None:
    """Changed captions, files, rules and sizes of shards, one after the other, from what was left each time."""
    out = tmp_path / "out"

    def changed_caption() -> None:
        (source / "00.txt").write_text("another")

    def changed_file() -> None:
        (source / "01.mp4").write_bytes(clip(99))

    def same_size_other_time() -> None:
        os.utime(source / "02.mp4", ns=(1, 1))

    def removed() -> None:
        (source / "04.mp4").unlink()

    steps: list[tuple[Callable[[], object], dict[str, object], int]] = [
        (lambda: None, {}, NUM),
        (changed_caption, {}, 0),
        (changed_file, {}, 1),
        (same_size_other_time, {}, 1),
        (removed, {}, 0),
        (lambda: None, {"clips_per_shard": 3}, 0),
        (lambda: None, {"clips_per_shard": 100}, 0),
        (lambda: None, {"min_frames": 5, "clips_per_shard": 3}, 0),
        (lambda: None, {"clips_per_shard": 2}, 0),
    ]
    for number, (change, options, decoded) in enumerate(steps):
        change()
        is_last = number == len(steps) - 1
        total = NUM if number < 4 else NUM - 1
        counter = Counter(-1 if is_last else total)
        with nullcontext() if is_last else pytest.raises(KeyboardInterrupt):
            run(source, out, counter, **options)
        assert counter.decoded == decoded, number
    run(source, tmp_path / "fresh")
    assert content(out) == content(tmp_path / "fresh")
    assert len(read_index(out)) == NUM - 2


def test_a_torn_journal_and_a_cut_shard(source: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    out, root = tmp_path / "out", tmp_path / ".out.partial"
    with pytest.raises(KeyboardInterrupt):
        run(source, out, Counter(NUM))
    journal = root / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    shard = root / "data" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:1000])
    (root / "data" / ".shard-000009.tar.partial").write_bytes(b"litter")
    counter = Counter()
    run(source, out, counter)
    assert counter.decoded <= 1
    assert content(out) == expected


def test_a_journal_of_another_decoder_counts_for_nothing(source: Path, tmp_path: Path) -> None:
    out, journal = tmp_path / "out", tmp_path / ".out.partial" / "journal.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(source, out, Counter(NUM))
    journal.write_bytes(journal.read_bytes().replace(b'"decoder": "av ', b'"decoder": "av 1.'))
    counter = Counter()
    run(source, out, counter)
    assert counter.decoded == NUM


@pytest.mark.parametrize("moves", range(1, 11))
def test_cut_off_while_it_is_moved(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes], moves: int
) -> None:
    """The same command finishes what was half moved, without --overwrite, and decodes nothing."""
    out, replace, left = tmp_path / "out", Path.replace, [moves]

    def dying(path: Path, target: Path) -> Path:
        if target.parent == out:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        run(source, out)
    monkeypatch.undo()
    counter = Counter()
    run(source, out, counter)
    assert counter.decoded == 0
    assert content(out) == expected


def test_a_file_that_cannot_be_read_now_is_tried_again(source: Path, tmp_path: Path) -> None:
    """A broken mount may be whole tomorrow, with the same size and time."""
    path, away = source / "05.mp4", tmp_path / "away.mp4"

    def vanish(tally: Tally) -> None:
        if tally.done == 5:
            path.rename(away)
        if tally.done == NUM:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", vanish)
    away.rename(path)
    assert "05.mp4" in run(source, tmp_path / "out").kept


class TestDuplicates:
    @pytest.fixture(autouse=True)
    def copies(self, source: Path) -> None:
        for name in ("07", "09"):
            (source / f"{name}.mp4").write_bytes(clip(1))

    def test_they_are_reported(self, source: Path, tmp_path: Path) -> None:
        report = run(source, tmp_path / "out")
        assert report.duplicates == (("07.mp4", "01.mp4"), ("09.mp4", "01.mp4"))
        assert len(report.kept) == NUM - 1
        hashes = [ref.video_sha256 for ref in read_index(tmp_path / "out")]
        assert (len(hashes), len(set(hashes))) == (NUM - 1, NUM - 3)

    def test_they_are_dropped_on_demand(self, source: Path, tmp_path: Path) -> None:
        report = run(source, tmp_path / "out", drop_duplicates=True, workers=2)
        assert len(report.kept) == NUM - 3
        assert dict(report.rejected)["09.mp4"] == "the same bytes as 01.mp4"
        assert len(report.duplicates) == 2

    def test_a_copy_of_what_is_rejected_is_none(self, source: Path, tmp_path: Path) -> None:
        (source / "01.txt").write_text("")
        report = run(source, tmp_path / "out", drop_duplicates=True)
        assert "07.mp4" in report.kept
        assert report.duplicates == (("09.mp4", "07.mp4"),)


class TestProgress:
    def test_lines_in_a_log(self, source: Path, tmp_path: Path) -> None:
        file = io.StringIO()
        with progress(Console(file=file), log_every_s=0) as watch:
            run(source, tmp_path / "out", watch)
        lines = file.getvalue().splitlines()
        assert len(lines) == NUM
        assert lines[-1].startswith("11/11 clips, 10 kept, 1 rejected, ")
        assert "MiB/s" in lines[-1]
        assert lines[-1].endswith("0:00:00 left")

    def test_few_lines_in_a_log(self, source: Path, tmp_path: Path) -> None:
        file = io.StringIO()
        with progress(Console(file=file)) as watch:
            run(source, tmp_path / "out", watch)
        assert file.getvalue() == ""

    def test_a_bar_on_a_terminal(self, source: Path, tmp_path: Path) -> None:
        file = io.StringIO()
        with progress(Console(file=file, force_terminal=True, width=120)) as watch:
            run(source, tmp_path / "out", watch)
        assert "11/11 clips, 10 kept, 1 rejected" in file.getvalue()
