"""Tars without an index, read from front to back: what is named, in which order, from which position, how refused."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from vidit.data import stream_file, stream_reader
from vidit.data.limits import ShardError, StorageError
from vidit.data.remote import DIRECT, Reach, RemoteFile, RemoteFolder
from vidit.data.stream_plan import Counts, Mark, Plan, begin, resumed
from vidit.data.stream_reader import Item, Position, Reader, clips_in
from vidit.data.stream_tars import Tars, find_tars
from vidit.data.tar import Limits

Members = Sequence[tuple[str, bytes]]


def write_tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def clips(*keys: str) -> list[tuple[str, bytes]]:
    return [m for key in keys for m in ((f"{key}.mp4", b"v" * (300 + 97 * len(key))), (f"{key}.txt", key.encode()))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """7 tars of 1 to 7 clips, 28 in all."""
    for number in range(7):
        keys = [f"{number}-{clip}" for clip in range(number + 1)]
        write_tar(tmp_path / "tars" / f"{number:05}.tar", clips(*keys))
    return tmp_path / "tars"


def tars_of(folder: Path, seed: int = 3) -> Tars:
    return find_tars(str(folder), seed, DIRECT)


def taken(tars: Tars, readers: int, reader: int, buffer: int = 0, num: int = 60) -> list[tuple[int, int, str]]:
    own = Reader(tars, 1, readers, Position(reader), buffer)
    return [(item.place, item.ordinal, item.name) for item in (own.take() for _ in range(num))]


class TestTars:
    def test_the_four_ways_to_name_them(self, folder: Path) -> None:
        names = tuple(f"{number:05}.tar" for number in range(7))
        listed = folder.parent / "list.txt"
        listed.write_text("tars/{00000..00003}.tar\n\n" + f"{folder}/00004.tar\ntars/00005.tar\ntars/00006.tar\n")
        for train in (folder, f"{folder}/{{00000..00006}}.tar", listed):
            found = find_tars(str(train), 0, DIRECT)
            assert found.names == names
            assert found.sha256 == tars_of(folder).sha256
        assert find_tars(f"{folder}/00003.tar", 0, DIRECT).names == ("00003.tar",)

    def test_urls_share_a_folder_and_names_of_several_folders_differ(self) -> None:
        found = find_tars("https://host/{a,b}/{0..1}.tar", 0, Reach(stall_s=7))
        assert found.names == ("a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar")
        first, second = found.files[:2]
        assert isinstance(first, RemoteFile)
        assert first.parent is second.parent
        assert first.parent.reach.stall_s == 7
        assert pickle.loads(pickle.dumps(found)) == found

    @pytest.mark.parametrize(
        ("train", "fault"),
        [
            ("https://host/clips", "does not end in .tar"), ("nowhere/{0..2}.tar", "nowhere/0.tar is not a file"),
            ("pipe:cat 0.tar", "pipe:cat 0.tar is not a file"), ("file:///etc/0.tar", "file:// is not read"),
            ("pipe://cat/0.tar", "pipe:// is not read"), ("a{0..1.tar", "braces"), ("missing.txt", "cannot be read"),
            ("https://host/{1,1}.tar", "more than once"), ("https://host/a b.tar", "letters"),
            ("https://host/{0..1000000}.tar", "more than 1000000 tars"), ("0.tar.gz", "does not end in .tar"),
        ],
    )  # fmt: skip
    def test_what_is_refused(self, train: str, fault: str) -> None:
        with pytest.raises(ValueError, match=fault):
            find_tars(train, 0, DIRECT)

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="names no tar"):
            find_tars(str(tmp_path), 0, DIRECT)

    def test_an_epoch_is_a_permutation_and_epochs_differ(self, folder: Path) -> None:
        tars = tars_of(folder)
        epochs = [[tars.number(place) for place in range(7 * e, 7 * e + 7)] for e in range(3)]
        assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 3
        assert epochs[0] != [tars_of(folder, 4).number(place) for place in range(7)]


class TestReader:
    @pytest.mark.parametrize("readers", [1, 2, 3, 7])
    @pytest.mark.parametrize("buffer", [0, 5])
    def test_readers_share_an_epoch_clip_by_clip(self, folder: Path, readers: int, buffer: int) -> None:
        tars = tars_of(folder)
        first = [t for r in range(readers) for t in taken(tars, readers, r, buffer, 120) if t[0] < 7]
        assert sorted(name for _, _, name in first) == sorted(
            f"{n:05}.tar/{n}-{clip}" for n in range(7) for clip in range(n + 1)
        )

    def test_without_a_buffer_a_tar_comes_in_its_order(self, folder: Path) -> None:
        got = taken(tars_of(folder), 2, 1)
        assert got == sorted(got)
        assert {place % 2 for place, _, _ in got} == {1}

    def test_a_buffer_shuffles_in_blocks(self, folder: Path) -> None:
        tars = tars_of(folder)
        plain, mixed = taken(tars, 1, 0), taken(tars, 1, 0, 10)
        assert plain != mixed
        for start in range(0, 60, 10):
            assert sorted(mixed[start : start + 10]) == plain[start : start + 10]

    @pytest.mark.parametrize("buffer", [0, 1, 4, 9])
    def test_it_goes_on_from_any_position(self, folder: Path, buffer: int) -> None:
        tars = tars_of(folder)
        reader = Reader(tars, 1, 2, Position(1), buffer)
        positions, items = [], []
        for _ in range(40):
            positions.append(reader.position)
            items.append(reader.take())
        for number, position in enumerate(positions):
            again = Reader(tars, 1, 2, position, buffer)
            assert [again.take() for _ in range(number, 40)] == items[number:], position

    def test_memory_is_bounded_in_bytes(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stream_reader, "BLOCK_BYTES", 2000)
        tars, held = tars_of(folder), []
        reader = Reader(tars, 1, 1, Position(0), 1000)
        for _ in range(50):
            reader.take()
            kept = [item for item in reader._block if item] + reader._next.items
            held.append(sum(item.num_bytes for item in kept))
        assert max(held) < 2 * 2000 + 1000
        assert max(held) > 2000

    def test_what_is_passed_over_is_not_read(self, folder: Path) -> None:
        items = list(clips_in(folder / "00006.tar", skip=4))
        assert [(item.ordinal, item.name) for item in items] == [(4, "6-4"), (5, "6-5"), (6, "6-6")]
        assert list(clips_in(folder / "00006.tar"))[4:] == items


class TestRefusals:
    def read(self, tars: Tars, num: int) -> list[Item]:
        reader = Reader(tars, 1, 1, Position(0), 0)
        return [reader.take() for _ in range(num)]

    @pytest.mark.parametrize(
        ("members", "reason"),
        [
            ([*clips("a"), ("b.pyd", b"x")], "suffix 'pyd'"), ([*clips("a"), ("../b.mp4", b"x")], "leads out"),
            ([*clips("a", "b"), ("a.json", b"{}")], "do not stand together"),
            ([*clips("a"), ("b.mp4", b"x"), ("b.mp4", b"x")], "there twice"), ([], "is empty"),
            ([*clips("a"), ("b.txt", b"x" * (4 << 20) + b"x")], "the limit is"),
        ],
    )  # fmt: skip
    def test_a_tar_is_refused_by_name_and_the_next_one_read(
        self, tmp_path: Path, members: Members, reason: str
    ) -> None:
        write_tar(tmp_path / "bad.tar", members)
        write_tar(tmp_path / "good.tar", clips("g"))
        items = self.read(tars_of(tmp_path), 6)
        bad = [item for item in items if item.refused]
        assert {item.name for item in bad} == {"bad.tar"}
        assert all("bad.tar" in item.refused and reason in item.refused for item in bad)
        assert sum(item.name == "good.tar/g" for item in items) >= 2

    def test_a_truncated_tar_gives_what_stands_before(self, folder: Path) -> None:
        path = folder / "00006.tar"
        path.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(ShardError, match="truncated"):
            list(clips_in(path))
        with pytest.raises(ShardError, match="truncated"):
            list(clips_in(path, skip=2))

    def test_a_position_behind_a_refusal_is_kept(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "bad.tar", [*clips("a", "b"), ("c.pickle", b"x")])
        write_tar(tmp_path / "good.tar", clips("g", "h"))
        tars = tars_of(tmp_path)
        reader = Reader(tars, 1, 1, Position(0), 3)
        positions, items = [], []
        for _ in range(14):
            positions.append(reader.position)
            items.append(reader.take())
        for number, position in enumerate(positions):
            again = Reader(tars, 1, 1, position, 3)
            assert [again.take() for _ in range(number, 14)] == items[number:]

    def test_a_clip_with_two_videos_or_bad_text_is_skipped_alone(self, tmp_path: Path) -> None:
        members = [("a.mp4", b"1"), ("a.mkv", b"2"), ("b.mp4", b"1"), ("b.json", b"{"), ("c.mp4", b"1"),
                   ("c.json", b'{"caption": 3}'), ("c.txt", b"words"), ("d.txt", b"x")]  # fmt: skip
        two, bad, good, none = clips_in(write_tar(tmp_path / "0.tar", members))
        for call, reason in ((two.video, "2 videos"), (bad.caption, "not valid"), (none.video, "0 videos")):
            with pytest.raises(ValueError, match=reason):
                call()
        assert good.caption() == "words"

    def test_more_members_than_are_remembered(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stream_reader, "LIMITS", Limits(max_members=5))
        with pytest.raises(ShardError, match="more than 5 members"):
            list(clips_in(write_tar(tmp_path / "0.tar", clips("a", "b", "c"))))

    def test_a_disk_that_fails_is_no_bad_tar(self, tmp_path: Path) -> None:
        """/proc/self/mem is a file whose first bytes cannot be read."""
        link = tmp_path / "0.tar"
        link.symlink_to("/proc/self/mem")
        with pytest.raises(StorageError, match=r"0\.tar cannot be read"):
            list(clips_in(link))


class TestRemote:
    @pytest.mark.parametrize("chunk", [2048, 4096, 1 << 20])
    def test_the_same_clips_as_from_disk_in_order_and_once(
        self, folder: Path, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, chunk: int
    ) -> None:
        monkeypatch.setattr(stream_file.RemoteSequence.__init__, "__defaults__", (chunk,))
        with serve(folder) as web:
            remote = find_tars(f"{web.url}/{{00000..00006}}.tar", 3, DIRECT)
            local = tars_of(folder)
            # One is read ahead: the last clip of the epoch.
            assert taken(remote, 1, 0, num=27) == taken(local, 1, 0, num=27)
            first_epoch = [ask for ask in web.asked if ask[1:] != (0, 0)]
            assert len(set(first_epoch)) >= 7
            for name in {name for name, _, _ in first_epoch}:
                spans = [(a, b) for asked, a, b in first_epoch if asked == name]
                assert len(spans) == len(set(spans))

    def test_failures_of_the_network_change_nothing(
        self, folder: Path, serve: Callable[..., Any], chaos: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stream_file.RemoteSequence.__init__, "__defaults__", (4096,))
        with serve(folder) as web:
            web.mischief = chaos(5, 0.3, ("drop", "reset", "truncate", "503", "429"))
            remote = find_tars(f"{web.url}/{{00000..00006}}.tar", 3, Reach(stall_s=5, patience_s=60))
            assert taken(remote, 1, 0, num=28) == taken(tars_of(folder), 1, 0, num=28)
            assert {"drop", "truncate"} <= set(web.done)

    def test_a_tar_that_is_not_there_is_refused(self, folder: Path, serve: Callable[..., Any]) -> None:
        with serve(folder) as web:
            remote = find_tars(f"{web.url}/{{00006..00007}}.tar", 3, DIRECT)
            reader = Reader(remote, 1, 1, Position(0), 0)
            items = [reader.take() for _ in range(9)]
        assert any("404" in item.refused and item.name == "00007.tar" for item in items)

    def test_what_was_passed_is_not_read_again(self, folder: Path, serve: Callable[..., Any]) -> None:
        with serve(folder) as web:
            file = RemoteFolder(web.url) / "00006.tar"
            size = (folder / "00006.tar").stat().st_size
            sequence = stream_file.RemoteSequence(file, size, 2048)
            assert sequence.read(5000) == (folder / "00006.tar").read_bytes()[:5000]
            sequence.seek(10)
            with pytest.raises(ValueError, match="was passed"):
                sequence.read(1)


class TestPlan:
    def test_marks_travel_as_json(self) -> None:
        mark = Mark(3, Position(7, 2, 1), too_short=[("a", "too short")])
        mark.count(7, delivered=1)
        mark.count(7, skipped=1)
        assert mark.counts == {7: Counts(1, 1, 0, 0)}
        assert Mark.heard(mark.told()) == mark

    def test_the_same_readers_go_on(self) -> None:
        positions = [[4, 2, 0], [7, 0, 3]]
        plan, note = resumed({"positions": positions}, 2, 10)
        assert plan == Plan((Position(4, 2, 0), Position(7, 0, 3)))
        assert "2 readers go on where they were" in note
        assert "5 clips are passed over" in note

    def test_others_begin_at_the_first_unfinished_tar(self) -> None:
        """Of 3 readers one is in its second tar, the others beyond: nothing before place 4 is open."""
        plan, note = resumed({"positions": [[6, 0, 0], [4, 2, 0], [8, 1, 0]]}, 2, 5)
        assert plan == begin(2, 4) == Plan((Position(4), Position(5)))
        # Place 4 is begun; reader 2 has finished 5 and begun 8; reader 0 has finished 3 and begun nothing.
        assert "2 readers instead of 3: all begin at tar 5 of epoch 1" in note
        assert "3 tars are read again" in note

    @pytest.mark.parametrize("readers", [1, 2, 4])
    def test_no_clip_is_lost_when_the_readers_change(self, folder: Path, readers: int) -> None:
        tars = tars_of(folder)
        before = [Reader(tars, 1, 3, Position(r), 4) for r in range(3)]
        seen = {item.number for r, own in enumerate(before) for item in (own.take() for _ in range(3 + 5 * r))}
        plan, _ = resumed({"positions": [list(own.position) for own in before]}, readers, 7)
        for position in plan.positions:
            own = Reader(tars, 1, readers, position, 4)
            seen |= {item.number for item in islice(iter(own.take, None), 200)}
        places = range(2 * 7)
        expected = {place << 20 | clip for place in places for clip in range(tars.number(place) + 1)}
        assert expected <= seen
