"""Scoring a data set: resumed after a kill, the same files whatever happened, plug-ins checked, faults named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from vidit.data.curation.rows import partial_path, read_partial, read_shard_scores, scores_path
from vidit.data.curation.score_clip import BUILT_IN
from vidit.data.curation.score_set import score_set
from vidit.data.curation.table import read_table, select_clips
from vidit.data.encode import encode_mp4
from vidit.data.pack import pack
from vidit.data.scenes import render, sample_scene
from vidit.data.shard_writer import ShardWriter
from vidit.data.shards import read_index

NUM_CLIPS = 10
V, F = '__version__ = "1"\n', "def f(frames, caption):\n    return "


def write_set(folder: Path, num_clips: int = NUM_CLIPS, first: int = 0) -> Path:
    """Scenes in shards of four; the last is the first at half the size."""
    folder.mkdir()
    with ShardWriter(folder, 4) as writer:
        for index in range(first, first + num_clips):
            frames = np.asarray(render(sample_scene(0, first if index == num_clips - 1 else index, "train")))
            if index == num_clips - 1:
                frames = np.stack([cv2.resize(frame, (48, 48), interpolation=cv2.INTER_AREA) for frame in frames])
            facts = {"caption": f"clip {index}", "fps": 8.0, "num_frames": len(frames)}
            facts |= {"height": frames.shape[1], "width": frames.shape[2]}
            writer.add(f"clip{index}", encode_mp4(frames, 8.0), facts, "mp4")
        writer.close()
    return folder


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_set(tmp_path / "data")


def content(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern))}


def test_scores_lie_beside_the_shards_and_nothing_else_changes(dataset: Path) -> None:
    before, heard = content(dataset), list[tuple[int, int]]()
    report = score_set(dataset, progress=lambda done, total: heard.append((done, total)))
    assert (report.num_clips, report.num_scored, report.faults, report.num_duplicates) == (10, 10, (), 1)
    assert heard == [(i, 10) for i in range(1, 11)]
    after = content(dataset)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {f"shard-00000{i}.scores.jsonl" for i in range(3)}
    header = json.loads(after["shard-000000.scores.jsonl"].splitlines()[0])
    assert header["scorers"] == [BUILT_IN]
    table = read_table(read_index(dataset))
    assert [ref.key for ref in table.refs] == [f"clip{i}" for i in range(10)]
    assert table.columns["duplicate_of"] == [None] * 9 + ["clip0"]
    assert score_set(dataset).num_scored == 0
    assert content(dataset) == after


def test_workers_give_the_same_files(dataset: Path, tmp_path: Path) -> None:
    other = write_set(tmp_path / "other")
    score_set(dataset)
    score_set(other, workers=2)
    assert content(dataset) == content(other)


def test_a_killed_run_goes_on_where_it_was(dataset: Path, tmp_path: Path) -> None:
    """Killed by SIGKILL in the second shard, half a line left behind; the end is as if nothing had happened."""
    (tmp_path / "slow.py").write_text(
        'import time\n__version__ = "1"\n\n\ndef slow(frames, caption):\n'
        '    time.sleep(0.15)\n    open("calls", "a").write(caption + "\\n")\n    return {"size": frames.size}\n'
    )
    command = [sys.executable, "-m", "vidit.cli", "score", str(dataset), "--plugin", "slow:slow", "--workers", "0"]
    root = Path(__file__).parents[4]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{tmp_path}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    second = partial_path(dataset / "shard-000001.tar")
    until = time.monotonic() + 60
    while not (second.is_file() and second.read_text().count("\n") >= 2):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    known = len(read_partial(dataset / "shard-000001.tar")) + 4
    with second.open("a") as file:
        file.write('{"key": "clip7", "vid')
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) <= NUM_CLIPS + 1, "what was scored is not scored again, but for the one that was at work"
    assert len(calls) - calls.count(calls[known]) >= NUM_CLIPS - 1
    assert not list(dataset.glob("*.partial.jsonl"))

    other = write_set(tmp_path / "other")
    score_set(other)  # then the plug-in alone
    once = [*command]
    once[once.index(str(dataset))] = str(other)
    assert subprocess.run(once, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL).returncode == 0
    assert content(dataset) == content(other)


def test_a_clip_that_does_not_decode_is_named_and_dropped(dataset: Path) -> None:
    ref = read_index(dataset)[2]
    with ref.shard_path.open("r+b") as file:
        file.seek(ref.video_offset + ref.video_size // 2)
        file.write(b"damage")
    report = score_set(dataset)
    ((key, reason),) = report.faults
    assert key == "clip2"
    assert "CRC-32" in reason
    assert score_set(dataset).num_scored == 0, "a fault is a result"
    chosen = select_clips(read_index(dataset), ["cuts >= 0"])
    assert [key for key, _ in chosen.dropped] == ["clip2"]
    assert "select: 1 clips do not decode" in chosen.lines


def test_scores_of_other_clips_do_not_count(dataset: Path, tmp_path: Path) -> None:
    """Packed anew with other videos under the same keys: refused until they are scored, and scored anew."""
    score_set(dataset)
    other = tmp_path / "other"
    other.mkdir()
    with ShardWriter(other, 4) as writer:
        for index in range(NUM_CLIPS):
            frames = render(sample_scene(1, index, "train"))
            facts = {"caption": "x", "fps": 8.0, "num_frames": len(frames), "height": 64, "width": 64}
            writer.add(f"clip{index}", encode_mp4(frames, 8.0), facts, "mp4")
        writer.close()
    for path in dataset.glob("*.scores.jsonl"):
        (other / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="are not of its clip clip0; run `vidit score"):
        select_clips(read_index(other), ["motion > 0"])
    assert score_set(other).num_scored == NUM_CLIPS


def test_missing_scores_name_the_command(dataset: Path) -> None:
    with pytest.raises(ValueError, match=f"shard-000000.tar has no scores; run `vidit score {dataset}` first"):
        select_clips(read_index(dataset), ["motion > 0"])
    assert select_clips(read_index(dataset), []).refs == list(read_index(dataset)), "without rules none are needed"


def test_another_distance_searches_again_and_scores_nothing(dataset: Path) -> None:
    score_set(dataset)
    strict = score_set(dataset, max_distance=0)
    assert (strict.num_scored, strict.num_duplicates) == (0, 0)


def test_the_largest_copy_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    frames = np.asarray(render(sample_scene(0, 3, "train")))
    with ShardWriter(folder, 1) as writer:
        for side in (48, 64, 56):
            small = np.stack([cv2.resize(frame, (side, side), interpolation=cv2.INTER_AREA) for frame in frames])
            facts = {"caption": "x", "fps": 8.0, "num_frames": len(frames), "height": side, "width": side}
            writer.add(f"side{side}", encode_mp4(small, 8.0), facts, "mp4")
        writer.close()
    score_set(folder)
    assert read_table(read_index(folder)).columns["duplicate_of"] == ["side64", None, "side64"]


def test_packing_again_takes_the_folder_for_its_own(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for index in range(2):
        (tmp_path / "videos" / f"{index}.mp4").write_bytes(encode_mp4(render(sample_scene(0, index, "train")), 8.0))
        (tmp_path / "videos" / f"{index}.txt").write_text("a caption")
    pack(tmp_path / "videos", tmp_path / "data")
    score_set(tmp_path / "data")
    scored = content(tmp_path / "data")
    assert pack(tmp_path / "videos", tmp_path / "data").unchanged
    assert content(tmp_path / "data") == scored


def test_damaged_scores_are_refused(dataset: Path) -> None:
    score_set(dataset)
    path = scores_path(dataset / "shard-000001.tar")
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match=r"shard-000001.scores.jsonl is damaged .*delete it and run `vidit score`"):
        read_shard_scores(dataset / "shard-000001.tar")


Plugin = Callable[[str], str]


@pytest.fixture
def plugin(tmp_path: Path) -> Plugin:
    """(body of the module) -> its name for --plugin; the function is called `f`."""
    count = iter(range(99))

    def write(body: str) -> str:
        path = tmp_path / f"plugin{next(count)}.py"
        path.write_text(body)
        return f"{path}:f"

    return write


def test_a_plugin_adds_its_scores_alone_and_is_named_with_its_version(dataset: Path, plugin: Plugin) -> None:
    score_set(dataset)
    before = read_table(read_index(dataset)).columns
    body = '__version__ = "{}"\ndef f(frames, caption):\n    assert frames.dtype == "uint8" and frames.shape[3] == 3\n'
    body += '    return {{"words": len(caption.split()) + {}, "stills": len(frames)}}\n'
    name = plugin(body.format(1, 0))
    assert score_set(dataset, [name]).num_scored == NUM_CLIPS
    table = read_table(read_index(dataset))
    assert list(table.columns["words"]) == [2.0] * NUM_CLIPS
    assert list(table.columns["stills"]) == [9.0] * NUM_CLIPS
    assert {key: table.columns[key] for key in before} == before
    assert table.scorers == tuple(sorted((f"{name}@1", BUILT_IN)))
    assert score_set(dataset, [name]).num_scored == 0
    assert score_set(dataset).num_scored == 0, "what a plug-in found stays"

    newer = plugin(body.format(2, 50))  # of another size: Python would take what it has compiled within this second
    Path(name.rpartition(":")[0]).write_text(Path(newer.rpartition(":")[0]).read_text())
    command = [sys.executable, "-m", "vidit.cli", "score", str(dataset), "--plugin", name]
    assert subprocess.run(command, cwd=Path(__file__).parents[4], stdout=subprocess.DEVNULL).returncode == 0
    table = read_table(read_index(dataset))
    assert list(table.columns["words"]) == [52.0] * NUM_CLIPS
    assert f"{name}@1" not in table.scorers


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("def f(frames, caption):\n    return {}", ValueError, "has no __version__"),
        (V, ValueError, "has no function 'f'"),
        ("import no_such_module", ValueError, "does not load: ModuleNotFoundError"),
        (V + F + '{"motion": 1}', RuntimeError, "both give a score 'motion'"),
        (V + F + '{"a": float("nan")}', RuntimeError, "clip0: a=nan is no finite number"),
        (V + F + "5", RuntimeError, "clip clip0: it gave 5; return"),
        (V + F + '{"A b": 5}', RuntimeError, "a score is named 'A b'"),
        (V + F + "{}[caption]", RuntimeError, "KeyError: 'clip 0'"),
        (V + F + '{"x" if caption == "clip 0" else "y": 1}', RuntimeError, "gave x for clip clip0, y for clip1"),
    ],
)  # fmt: skip
def test_a_wrong_plugin_is_refused(
    dataset: Path, plugin: Plugin, body: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        score_set(dataset, [plugin(body)])


@pytest.mark.parametrize("name", ["plain", ":f", "no/such/file.py:f", "no_such_module_here:f"])
def test_a_plugin_that_is_not_there_is_named(dataset: Path, name: str) -> None:
    with pytest.raises(ValueError, match="plug-in"):
        score_set(dataset, [name])


def test_a_second_process_waits_its_turn(dataset: Path, plugin: Plugin) -> None:
    """The plug-in runs while the folder is being scored: from within, a second run is refused."""
    body = (
        '__version__ = "1"\nfrom pathlib import Path\nfrom vidit.data.curation.score_set import score_set\n'
        f'def f(frames, caption):\n    score_set(Path("{dataset}"))\n'
    )
    with pytest.raises(RuntimeError, match="another process scores"):
        score_set(dataset, [plugin(body)])


def test_a_plugin_that_crashes_on_a_clip_is_its_fault(dataset: Path, plugin: Plugin) -> None:
    body = '{"x": __import__("os").kill(__import__("os").getpid(), 11) if caption == "clip 3" else 1.0}'
    report = score_set(dataset, [plugin(V + F + body)], workers=2)
    ((key, reason),) = report.faults
    assert key == "clip3"
    assert "ended the process, twice" in reason
