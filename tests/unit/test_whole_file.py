"""A file is whole or what it was before: after a crash and on a full disk too, with the mode that the umask says."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vidit import whole_file
from vidit.whole_file import full_disk_explained, write_whole


def test_text_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "Käse\n")
    assert path.read_text(encoding="utf-8") == "Käse\n"
    write_whole(path, b"\0\xff")
    assert path.read_bytes() == b"\0\xff"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_mode_follows_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_a_fault_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException, place: str
) -> None:
    path = tmp_path / "a"
    write_whole(path, "old")

    def fail(*_: object) -> None:
        raise fault

    monkeypatch.setattr(whole_file.os if place == "fsync" else Path, place, fail)
    with pytest.raises(type(fault)) as caught:
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    if isinstance(caught.value, OSError):
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))


def test_a_full_disk_is_one_message_with_a_cure(small_disk: Path) -> None:
    path = small_disk / "a"
    write_whole(path, "old")
    with (
        pytest.raises(RuntimeError, match=rf"cannot write to {path}: No space left on device; free space, then run"),
        full_disk_explained(small_disk),
    ):
        write_whole(path, bytes(2 << 20))
    assert path.read_text() == "old"
    assert list(small_disk.iterdir()) == [path]


def test_other_errors_are_not_explained_away(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), full_disk_explained(tmp_path):
        write_whole(tmp_path / "none" / "a", "x")
