"""Which clip stands where, and the micro-batches made of it: a pure function of (config, number, rank, world)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vidit.config import RunConfig
from vidit.data.catalog import Catalog, catalogue
from vidit.data.encode import encode_mp4
from vidit.data.loader import Batch, MicroBatches, batches
from vidit.data.order import ClipOrder, Shares, epoch_order, split_places, substitute
from vidit.data.schedule import Schedule
from vidit.data.shard_writer import ShardWriter
from vidit.data.shards import read_index
from vidit.text.bytes import ByteTokenizer

Configure = Callable[..., RunConfig]
TOKENIZER = ByteTokenizer(8, 64)


def places(micro: int, image_rows: int, world: int, rounds: int) -> tuple[dict[int, int], dict[int, int]]:
    """Row -> place of the video rows and of the image rows, over all ranks."""
    videos, images = {}, {}
    schedule = Schedule(Shares(0, "buckets", (1,)), world, (micro,), (1.0,))
    for index in range(rounds):
        for rank in range(world):
            of = schedule.of_rank(index, rank, world)
            rows = of.rows
            one, two = split_places(of.number, len(rows), image_rows)
            videos |= zip(rows[: micro - image_rows], one, strict=True)
            images |= zip(rows[micro - image_rows :], two, strict=True)
    return videos, images


def same(a: Batch, b: Batch) -> bool:
    """Whether two batches agree in every bit."""
    pictures = (a.images is None and b.images is None) or (
        a.images is not None and b.images is not None and torch.equal(a.images.pixels, b.images.pixels)
    )
    return (
        (a.rows, a.keys, a.skipped) == (b.rows, b.keys, b.skipped)
        and torch.equal(a.clips.pixels, b.clips.pixels)
        and torch.equal(a.tokens.ids, b.tokens.ids)
        and pictures
    )


def dataset_of(config: RunConfig, rank: int = 0, world: int = 1) -> MicroBatches:
    return MicroBatches(config, Catalog.plain(read_index(config.data.train)), TOKENIZER, 3, rank=rank, world=world)


def test_an_epoch_is_a_permutation_and_the_next_is_another() -> None:
    orders = [epoch_order(3, "clips", epoch, 101) for epoch in range(3)]
    assert all(sorted(order) == list(range(101)) for order in orders)
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], epoch_order(4, "clips", 0, 101))
    assert not np.array_equal(orders[0], epoch_order(3, "images", 0, 101))
    order = ClipOrder(3, "clips", (np.arange(101),))
    stream = [order.at(place) for place in range(303)]
    assert stream == [int(i) for order in orders for i in order]


@pytest.mark.parametrize(("micro", "image_rows", "world"), [(4, 0, 1), (4, 1, 1), (4, 1, 3), (5, 2, 2), (3, 3, 1)])
def test_places_have_no_gaps(micro: int, image_rows: int, world: int) -> None:
    """So each epoch of each stream delivers each clip once."""
    rounds = 7
    videos, images = places(micro, image_rows, world, rounds)
    assert sorted(videos.values()) == list(range(rounds * world * (micro - image_rows)))
    assert sorted(images.values()) == list(range(rounds * world * image_rows))
    assert sorted([*videos, *images]) == list(range(rounds * world * micro))


def test_a_row_has_its_place_on_any_layout() -> None:
    """Without image rows micro-batch and world do not matter; with them, world does not."""
    expected, _ = places(12, 0, 1, 4)
    for micro, world in ((1, 1), (4, 1), (4, 3), (2, 2), (6, 2), (3, 4)):
        found, _ = places(micro, 0, world, 48 // (micro * world))
        assert found == expected == {row: row for row in range(48)}
    for world in (2, 3):
        assert places(4, 1, world, 12 // world) == places(4, 1, 1, 12)


@pytest.mark.parametrize("image_rows", [0, 1])
def test_each_epoch_delivers_each_clip_once(configure: Configure, image_rows: int) -> None:
    micro = 2 + image_rows
    config = configure(data={"image_rows": image_rows}, train={"micro_batch": micro, "global_batch": micro})
    dataset = dataset_of(config)
    found = [dataset[i] for i in range(16)]
    for epoch in range(2):
        half = found[8 * epoch : 8 * epoch + 8]
        assert set(Counter(key for batch in half for key in batch.clips.keys).values()) == {1}
        assert len({key for batch in half for key in batch.clips.keys}) == 16
    if image_rows:  # one row of 3 images a batch: 16 batches are 3 epochs of 16 images
        pictures = [key for batch in found for key in batch.images.keys]
        assert all(len(set(pictures[start : start + 16])) == 16 for start in (0, 16, 32))


def test_ranks_together_deliver_what_one_does(configure: Configure) -> None:
    config = configure(data={"image_rows": 1, "random_crop": True, "height": 24, "width": 24}, train={"micro_batch": 2})
    alone = dataset_of(config)
    pair = [dataset_of(config, rank, 2) for rank in range(2)]
    assert all(same(alone[2 * i + rank], pair[rank][i]) for i in range(3) for rank in range(2))


def test_micro_batch_does_not_change_a_row(configure: Configure) -> None:
    """Keyed crop and caption dropout included."""
    data = {"random_crop": True, "height": 24, "width": 24, "caption_dropout": 0.5}
    whole = dataset_of(configure(data=data, train={"micro_batch": 8, "global_batch": 8}))[1]
    parts = [dataset_of(configure(data=data, train={"micro_batch": 2, "global_batch": 8}))[4 + i] for i in range(4)]
    assert [row for part in parts for row in part.rows] == whole.rows == list(range(8, 16))
    assert [key for part in parts for key in part.keys] == whole.keys
    assert torch.equal(torch.cat([part.clips.pixels for part in parts]), whole.clips.pixels)
    assert torch.equal(torch.cat([part.tokens.ids for part in parts]), whole.tokens.ids)
    assert 0 < (whole.tokens.mask_BL.sum(1) == 1).sum() < 8, "some captions are dropped, some are not"


def test_a_keyed_share_of_the_clips_is_mirrored(configure: Configure) -> None:
    fixed, mirrored, some = (
        dataset_of(configure(data={"horizontal_flip": share}, train={"micro_batch": 8, "global_batch": 8}))[0].clips
        for share in (0.0, 1.0, 0.5)
    )
    assert torch.equal(mirrored.pixels, fixed.pixels.flip(3))
    flipped = [torch.equal(a, b) for a, b in zip(some.pixels, mirrored.pixels, strict=True)]
    unchanged = [torch.equal(a, b) for a, b in zip(some.pixels, fixed.pixels, strict=True)]
    assert 0 < sum(flipped) < 8
    assert [not one for one in flipped] == unchanged
    data = {"horizontal_flip": 0.5, "image_rows": 1, "num_workers": 2}
    alone, workers = (list(batches(dataset_of(configure(data=data | more)), 0, 4)) for more in ({"num_workers": 0}, {}))
    assert all(same(a, b) for a, b in zip(alone, workers, strict=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_resume_give_the_same_batches(configure: Configure, workers: int) -> None:
    data = {"image_rows": 1, "random_crop": True, "height": 24, "width": 24}
    expected = list(batches(dataset_of(configure(data=data)), 0, 6))
    resumed = list(batches(dataset_of(configure(data={**data, "num_workers": workers})), 2, 6))
    assert len(resumed) == 4
    assert all(same(a, b) for a, b in zip(resumed, expected[2:], strict=True))


def broken_dataset(folder: Path, broken: set[int], total: int = 8) -> Path:
    """Clips of which some do not decode, though the index knows nothing of it."""
    rng = np.random.default_rng(0)
    with ShardWriter(folder) as writer:
        for i in range(total):
            video = encode_mp4(rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8), 8)
            video = b"not a video" if i in broken else video
            sidecar = {"caption": f"clip {i}", "width": 32, "height": 32, "fps": 8.0, "num_frames": 5}
            writer.add(f"clip-{i}", video, sidecar)
    return folder


def test_a_broken_clip_is_replaced_and_named(configure: Configure, tmp_path: Path) -> None:
    config = configure(data={"train": str(broken_dataset(tmp_path, {2, 5}))})
    refs = read_index(config.data.train)
    seen = [dataset_of(config)[i] for i in range(8)]
    again = [dataset_of(config)[i] for i in range(8)]
    assert all(same(a, b) for a, b in zip(seen, again, strict=True)), "the substitute is keyed"
    skipped = [key for batch in seen for key, _ in batch.skipped]
    assert {"clip-2", "clip-5"} == set(skipped)
    assert len(skipped) >= 4, "two epochs meet both"
    assert all("clip-2" not in batch.keys and "clip-5" not in batch.keys for batch in seen)
    assert all("does not open" in reason for batch in seen for _, reason in batch.skipped)
    order = ClipOrder(0, "clips", (np.arange(8),))
    place = next(p for p in range(16) if refs[order.at(p)].key == "clip-2")
    stand_in = refs[substitute(0, place, 0, 8)].key
    if stand_in not in ("clip-2", "clip-5"):
        assert seen[place // 2].keys[place % 2] == stand_in


def test_a_clip_damaged_after_it_was_packed_is_skipped(configure: Configure, tiny_clips: Path, tmp_path: Path) -> None:
    """Three flipped bits that leave the tar whole and that most decoders show as a picture."""
    folder = Path(shutil.copytree(tiny_clips, tmp_path / "clips"))
    config = configure(data={"train": str(folder)})
    refs = read_index(folder)
    content = bytearray(refs[3].shard_path.read_bytes())
    for part in (3, 4, 5):
        content[refs[3].video_offset + refs[3].video_size * part // 6] ^= 1
    refs[3].shard_path.write_bytes(content)
    seen = [dataset_of(config)[i] for i in range(8)]
    [(key, reason)] = [skip for batch in seen for skip in batch.skipped if skip[0] == refs[3].key]
    assert key not in [key for batch in seen for key in batch.keys]
    assert re.search(r"CRC-32 [0-9a-f]{8}, its index says [0-9a-f]{8}", reason)


@pytest.mark.parametrize(("allowed", "task"), [(False, "dit"), (True, "dit"), (False, "vae")])
def test_empty_captions_are_skipped_unless_meant(
    configure: Configure, tmp_path: Path, allowed: bool, task: str
) -> None:
    """A VAE reads no captions, so it takes every clip."""
    video = encode_mp4(np.zeros((5, 32, 32, 3), np.uint8), 8)
    captions = {"full": "a red circle", "empty": "", "white": " \n\u00a0", "also": "a blue star"}
    with ShardWriter(tmp_path, allow_empty_captions=allowed) as writer:
        for key, caption in captions.items():
            writer.add(key, video, {"caption": caption})
    dataset = dataset_of(configure(data={"train": str(tmp_path)}, train={"task": task}))
    seen = [dataset[0], dataset[1]]
    skipped = {key: reason for batch in seen for key, reason in batch.skipped}
    used = {key for batch in seen for key in batch.keys}
    if allowed or task == "vae":
        assert (used, skipped) == (set(captions), {})
        return
    assert used == {"full", "also"}
    assert set(skipped) == {"empty", "white"}
    assert "the caption is empty" in skipped["empty"]
    assert "the caption holds no printable text" in skipped["white"]


def test_a_micro_batch_keeps_a_row_for_a_clip(configure: Configure) -> None:
    for rows in (2, 3):
        config = configure(data={"image_rows": rows}, train={"micro_batch": 2})
        with pytest.raises(AssertionError, match=rf"image_rows={rows} leaves no row .*micro_batch=2"):
            dataset_of(config)


def test_a_dataset_of_broken_clips_is_an_error(configure: Configure, tmp_path: Path) -> None:
    config = configure(data={"train": str(broken_dataset(tmp_path, set(range(8))))})
    with pytest.raises(RuntimeError, match="20 clips in a row cannot be used, the last: clip-"):
        dataset_of(config)[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_changes_in_mid_run_is_one_message(configure: Configure, tmp_path: Path, workers: int) -> None:
    """A worker's error arrives as its own type and text, without the worker's traceback in the message."""
    config = configure(data={"train": str(broken_dataset(tmp_path, set())), "num_workers": workers})
    dataset = dataset_of(config)
    shard = tmp_path / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"shard-000000\.tar") as caught:
        list(batches(dataset, 0, 2))
    assert "Traceback" not in str(caught.value)


def test_catalogue_counts_short_and_cropped_clips(configure: Configure, tmp_path: Path) -> None:
    shapes = {"square": (5, 32, 32, 8.0), "wide": (5, 32, 48, 8.0), "short": (4, 32, 32, 8.0), "slow": (5, 32, 32, 4.0)}
    with ShardWriter(tmp_path) as writer:
        for key, (frames, height, width, fps) in shapes.items():
            video = encode_mp4(np.zeros((frames, height, width, 3), np.uint8), fps)
            writer.add(key, video, {"caption": key})
    refs = read_index(tmp_path)
    kept, dropped, cropped = catalogue([refs], configure(data={"train": str(tmp_path)}))
    assert [ref.key for ref in kept.refs] == ["square", "wide", "slow"]
    assert cropped == ["wide"]
    assert [key for key, _ in dropped] == ["short"]
    assert dropped.first[1] == "4 frames; data.num_frames=5"
    kept, dropped, _ = catalogue([refs], configure(data={"train": str(tmp_path), "fps": 4.0}))
    assert [ref.key for ref in kept.refs] == ["slow"]
    assert dropped.first[1] == "5 frames are 3 at data.fps=4 (its own rate is 8); data.num_frames=5"


def test_catalogue_agrees_with_the_decoder(configure: Configure, tmp_path: Path) -> None:
    """A clip that is kept decodes, one that is dropped would not: at every rate."""
    lengths, rates = (5, 9, 14, 18), (8.0, 25.0, 29.97)
    with ShardWriter(tmp_path) as writer:
        for frames in lengths:
            for fps in rates:
                video = encode_mp4(np.zeros((frames, 32, 32, 3), np.uint8), fps)
                writer.add(f"clip-{frames}-{int(fps)}", video, {"caption": "x"})
    refs = read_index(tmp_path)
    for fps in (0.0, 6.0, 8.0, 24.0):
        config = configure(data={"train": str(tmp_path), "fps": fps})
        kept = catalogue([refs], config)[0].refs
        dataset = MicroBatches(config, Catalog.plain(refs), None, 3)
        for ref in refs:
            try:
                dataset.decode(ref)
                decodes = True
            except ValueError:
                decodes = False
            assert decodes or ref not in kept, f"{ref.key} at {fps} fps is kept and does not decode"
            assert not decodes or ref in kept, f"{ref.key} at {fps} fps decodes and is dropped"


LEAVING = """
import sys
from vidit.config import RunConfig
from vidit.data.catalog import Catalog
from vidit.data.loader import MicroBatches, batches
from vidit.data.shards import read_index

if __name__ == "__main__":
    config = RunConfig.model_validate_json(sys.argv[1])
    kept = batches(MicroBatches(config, Catalog.plain(read_index(config.data.train)), None, 3), 0, 10**6)
    next(kept)
"""


def test_a_process_can_leave_while_its_workers_read(configure: Configure, tmp_path: Path) -> None:
    """They hold signals back, but not the one that Python ends its children with."""
    script = tmp_path / "leaving.py"
    script.write_text(LEAVING)
    config = configure(data={"num_workers": 1})
    done = subprocess.run([sys.executable, script, config.to_json()], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
