"""Every clip of an epoch is delivered, skipped or to come; and a record that says otherwise is caught."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vidit.config import RunConfig
from vidit.data.account import Account, AccountError, Epoch
from vidit.data.catalog import catalogue
from vidit.data.encode import encode_mp4
from vidit.data.loader import MicroBatches
from vidit.data.shard_writer import ShardWriter
from vidit.data.shards import read_index
from vidit.resolve import resolve

Configure = Callable[..., RunConfig]
SQUARE = {"height": 32, "width": 32}
Record = list[tuple[list[str], list[tuple[str, str]]]]


def packed(folder: Path, num: int, frames: int = 5, broken: tuple[int, ...] = ()) -> Path:
    rng = np.random.default_rng(0)
    with ShardWriter(folder) as writer:
        for i in range(num):
            video = encode_mp4(rng.integers(0, 256, (frames, 32, 32, 3), dtype=np.uint8), 8.0)
            sidecar = {"caption": "x", "width": 32, "height": 32, "fps": 8.0, "num_frames": frames}
            writer.add(f"clip-{i:02d}", video[: len(video) // 2] if i in broken else video, sidecar)
    return folder


def recorded(config: RunConfig, world: int, steps: int) -> tuple[Account, Record]:
    """What a run of `world` data ranks would write down, from the batches that its loaders give."""
    sources = [read_index(source.path) for source in config.data.sources]
    catalog, _, _ = catalogue(sources, config)
    account = Account(config, catalog, resolve(config).latent_frames)
    per_rank = account.schedule.per_step // world
    ranks = [
        MicroBatches(config, catalog, None, account.images_per_row, rank=rank, world=world) for rank in range(world)
    ]
    record: Record = []
    for step in range(steps):
        batches = [dataset[index] for index in range(step * per_rank, (step + 1) * per_rank) for dataset in ranks]
        record.append(([k for b in batches for k in b.keys], [skip for b in batches for skip in b.skipped]))
    return account, record


def ended(account: Account, record: Record) -> list[Epoch]:
    return [epoch for step, (keys, skipped) in enumerate(record, 1) for epoch in account.add(step, keys, skipped)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return packed(tmp_path / "data", 10, broken=(3, 7))


def test_epochs_of_a_run_with_broken_clips(configure: Configure, tmp_path: Path, folder: Path) -> None:
    config = configure(tmp_path, data={"train": str(folder)}, train={"global_batch": 4, "micro_batch": 2})
    account, record = recorded(config, 2, steps=6)
    done = ended(account, record)
    assert [(e.number, e.total, e.delivered, sorted(name for name, _ in e.skipped)) for e in done] == [
        (1, 10, 8, ["clip-03", "clip-07"]), (2, 10, 8, ["clip-03", "clip-07"])
    ]  # fmt: skip
    assert all("damaged" in reason or "open" in reason for _, reason in done[0].skipped), done[0].skipped
    third = account.epochs[("clips", 0, 0, 2)]
    assert third.delivered + len(third.skipped) == 4
    counts = f"{third.delivered} delivered, {len(third.skipped)} skipped, 6 not yet reached"
    assert third.line() == f"epoch 3: 10 clips, {counts}"


def test_a_later_start_counts_from_where_the_record_ends(configure: Configure, tmp_path: Path, folder: Path) -> None:
    config = configure(tmp_path, data={"train": str(folder)}, train={"global_batch": 4, "micro_batch": 2})
    whole, record = recorded(config, 1, steps=5)
    expected = [e.as_dict() for e in ended(whole, record)]
    for first in range(1, 5):
        later, _ = recorded(config, 1, steps=0)
        for step, (_, skipped) in enumerate(record[:first], 1):
            later.recall(step, skipped)
        found = [e for step in range(first, 5) for e in later.add(step + 1, *record[step])]
        assert [e.as_dict() for e in found] == expected[2 - len(found) :]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"image_rows": 1}, {("clips", "", 1), ("images", "", 3)}),
        (
            {"train": "", "mixture": 2, "num_validation": 0},
            {("clips", "data", 1), ("clips", "more", 2)},
        ),
        (
            {"buckets": [{**SQUARE, "num_frames": 1, "rows": 4}, {**SQUARE, "num_frames": 5, "keep": 0.5}]},
            {("clips", "1x32x32", 1), ("clips", "5x32x32", 1)},
        ),
    ],
    ids=["images", "mixture", "buckets"],
)  # fmt: skip
def test_streams_have_epochs_of_their_own(
    configure: Configure, tmp_path: Path, folder: Path, data: dict[str, Any], expected: set[tuple[str, str, int]]
) -> None:
    data = {"train": str(folder), **data}
    if data.pop("mixture", 0):
        more = packed(tmp_path / "more", 4)
        data["mixture"] = [{"path": str(folder), "weight": 1}, {"path": str(more), "weight": 1}]
    config = configure(tmp_path, data=data, train={"global_batch": 4, "micro_batch": 2})
    for world in (1, 2):
        account, record = recorded(config, world, steps=9)
        found = {(e.stream, e.where, e.number) for e in ended(account, record)}
        assert found >= expected, found
        assert all(e.delivered + len(e.skipped) == e.reached <= e.total for e in account.epochs.values())


def swapped(keys: list[str]) -> list[str]:
    return [keys[1], keys[0], *keys[2:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swapped, r"step 2: clip 5 of epoch 1 of its clips is clip-\d+; clip-\d+ was delivered instead, and nothing"),
        (lambda keys: keys[:-1], "step 2 asks for 4 clips, and was given 3"),
        (lambda keys: [*keys[:3], keys[0]], "step 2: clip 8 of epoch 1"),
    ],
    ids=["other order", "lost", "twice"],
)
def test_what_a_faulty_loader_would_deliver(
    configure: Configure, tmp_path: Path, change: Callable[[list[str]], list[str]], message: str
) -> None:
    config = configure(tmp_path, data={"train": str(packed(tmp_path / "data", 9))}, train={"global_batch": 4})
    account, record = recorded(config, 1, steps=2)
    account.add(1, *record[0])
    with pytest.raises(AccountError, match=message):
        account.add(2, change(record[1][0]), [])


def test_only_the_clip_that_is_drawn_may_stand_in(configure: Configure, tmp_path: Path, folder: Path) -> None:
    config = configure(tmp_path, data={"train": str(folder)}, train={"global_batch": 4, "micro_batch": 2})
    account, record = recorded(config, 1, steps=6)
    step = next(number for number, (_, skipped) in enumerate(record) if skipped)
    keys, skipped = record[step]
    due = [one.name for one in account.due(step + 1)]
    place = next(i for i, (key, name) in enumerate(zip(keys, due, strict=True)) if key != name)
    assert account.add(step + 1, keys, skipped) is not None
    other = next(f"clip-{i:02d}" for i in range(10) if f"clip-{i:02d}" not in (keys[place], due[place], *dict(skipped)))
    for stranger in ("no-such-clip", other):
        with pytest.raises(AccountError, match=rf"is {due[place]}; {stranger} was delivered instead"):
            account.add(step + 1, [*keys[:place], stranger, *keys[place + 1 :]], skipped)
    with pytest.raises(AccountError, match="is said to have skipped no-such-clip, which it did not ask for"):
        account.add(step + 1, keys, [*skipped, ("no-such-clip", "x")])


def test_substitutes_that_fail_are_counted_apart(configure: Configure, tmp_path: Path) -> None:
    """Of ten clips eight are broken: what is drawn for one is often broken too."""
    folder = packed(tmp_path / "data", 10, broken=tuple(range(8)))
    config = configure(tmp_path, data={"train": str(folder)}, train={"global_batch": 4, "micro_batch": 2})
    account, record = recorded(config, 1, steps=5)
    epochs = ended(account, record)
    assert [(epoch.delivered, len(epoch.skipped)) for epoch in epochs] == [(2, 8), (2, 8)]
    assert account.failed_substitutes
    total = sum(len(skipped) for _, skipped in record)
    assert total == 16 + len(account.failed_substitutes)
