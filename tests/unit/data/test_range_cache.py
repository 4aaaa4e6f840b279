"""The cache of byte ranges: within its limit, oldest out first, whole whatever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vidit.data.range_cache import RangeCache, on_disk

KIB = 1024
WRITER = """
import sys, random
from pathlib import Path
from vidit.data.range_cache import RangeCache
cache, dice = RangeCache(Path(sys.argv[1]), 1 << 20), random.Random(int(sys.argv[2]))
print("ready", flush=True)
for _ in range(int(sys.argv[3])):
    number = dice.randrange(60)
    found = cache.get(str(number))
    assert found is None or found == bytes([number]) * (20000 + number), number
    if found is None:
        cache.put(str(number), bytes([number]) * (20000 + number))
"""


def held(folder: Path) -> int:
    return sum(on_disk(path.stat().st_size - 16) for path in folder.glob("*/*.range"))


def writer(folder: Path, seed: int, rounds: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(seed), str(rounds)], text=True, stdout=subprocess.PIPE
    )


def test_what_was_put_is_got_and_nothing_else(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 1 << 20)
    assert cache.get("a") is None
    cache.put("a", b"one")
    cache.put("b", b"")
    cache.put("a", b"two")
    assert (cache.get("a"), cache.get("b")) == (b"two", b"")
    assert RangeCache(tmp_path, 1 << 20).get("a") == b"two"


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-1], lambda raw: raw[:-1] + b"x", lambda raw: b"", lambda raw: raw + b"x"]
)
def test_a_damaged_entry_is_a_miss_and_goes(tmp_path: Path, damage: object) -> None:
    cache = RangeCache(tmp_path, 1 << 20)
    cache.put("a", b"content")
    (path,) = tmp_path.glob("*/*.range")
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert cache.get("a") is None
    assert not path.exists()


def test_the_longest_unused_go_first_and_the_limit_holds(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 100 * KIB)
    for number in range(20):
        cache.put(str(number), bytes(10 * KIB))
        assert held(tmp_path) <= 100 * KIB
        assert cache.get("0") is not None, "used all the time"
        time.sleep(0.002)
    assert cache.get("19") is not None
    assert cache.get("1") is None
    cache.put("large", bytes(101 * KIB))
    assert cache.get("large") is None
    assert cache.get("0") is not None, "what does not fit at all drives nothing out"


def test_processes_share_it_and_one_that_is_killed_leaves_nothing_torn(tmp_path: Path) -> None:
    stranger = tmp_path / "ab" / "notes.txt"
    stranger.parent.mkdir()
    stranger.write_text("mine")
    steady, killed = writer(tmp_path, 1, 1500), writer(tmp_path, 2, 10**6)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "ready\n"
    while steady.poll() is None:
        time.sleep(0.2)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        killed = writer(tmp_path, 3, 10**6)
        assert killed.stdout is not None
        assert killed.stdout.readline() == "ready\n"
        assert held(tmp_path) <= 1 << 20
    killed.kill()
    killed.communicate()
    assert steady.wait() == 0, "every entry that was found was whole"
    cache = RangeCache(tmp_path, 1 << 20)
    found = [(number, cache.get(str(number))) for number in range(60)]
    assert any(content for _, content in found)
    assert all(content in (None, bytes([number]) * (20000 + number)) for number, content in found)
    assert stranger.read_text() == "mine"


def test_what_a_dead_process_left_is_cleared(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 100 * KIB)
    cache.put("a", b"x")
    (entry,) = tmp_path.glob("*/*.range")
    left = entry.with_name(f"{entry.stem}.12.0123abcd.partial")
    left.write_bytes(bytes(10))
    os.utime(left, (1, 1))
    for number in range(12):
        cache.put(str(number), bytes(10 * KIB))
    assert not left.exists()


def test_a_full_disk_costs_a_warning_and_no_error(small_disk: Path) -> None:
    cache = RangeCache(small_disk / "cache", 1 << 30)
    cache.put("0", bytes(300 * KIB))
    with pytest.warns(UserWarning, match="takes nothing more"):
        cache.put("1", bytes(900 * KIB))
    assert cache.get("0") == bytes(300 * KIB)
    assert not list(small_disk.rglob("*.partial"))


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache_dir=.*cannot be written"):
        RangeCache(tmp_path / "file" / "cache", 1 << 20)
