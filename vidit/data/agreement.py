"""Does an index belong to its tars? Every place and size is compared with the tar's, three headers are looked at.

Of each shard the headers of the first and the last clip and the zeros at the end are read; every other header is
compared when its clip is. Of many remote shards, where each look is a request, some are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vidit.data.clip_list import Table
from vidit.data.manifest import index_path
from vidit.data.remote import STREAMS
from vidit.data.storage import File, read_range
from vidit.data.tar import BLOCK, CURE, ShardError, check_header, padded

LOOKED_AT = 256
"""Of more remote shards than these so many are looked at, evenly spread."""
BLOCK_OF_CLIPS = 1 << 18
"""Clips that are compared at a time."""


def check_agreement(table: Table, num_bytes: NDArray[np.int64], size_of: Callable[[File], int] | None = None) -> None:
    """Compare a table with its tars, of ``num_bytes`` each by the manifest or the disk. ShardError, StorageError.

    ``size_of`` asks a remote storage for the size of a shard.
    """
    ends = np.concatenate([_ends(table, num_bytes, *block) for block in _blocks(table.starts)])

    def look(number: int) -> None:
        shard, size = table.shards[number], int(num_bytes[number])
        if size_of and (found := size_of(shard)) != size:
            raise ShardError(f"{shard}: {found} bytes, dataset.json says {size}; {CURE}")
        _look(table, number, int(ends[number]), size)

    numbers = range(len(table.shards))
    if all(isinstance(shard, Path) for shard in table.shards[:1]):
        for number in numbers:
            look(number)
    else:
        _at_once(look, sorted({int(at) for at in np.linspace(0, len(numbers) - 1, min(len(numbers), LOOKED_AT))}))


def _at_once(look: Callable[[int], None], numbers: Sequence[int]) -> None:
    with ThreadPoolExecutor(STREAMS) as pool:
        try:
            list(pool.map(look, numbers))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _blocks(starts: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Shards first to last - 1, whole, of about so many clips."""
    first = 0
    while first < len(starts) - 1:
        last = int(np.searchsorted(starts, starts[first] + BLOCK_OF_CLIPS, "right")) - 1
        last = max(last, first + 1)
        yield first, last
        first = last


def _ends(table: Table, num_bytes: NDArray[np.int64], first: int, last: int) -> NDArray[np.int64]:
    """Where the last member of each of these shards ends, filled up to a block, with all spans compared."""
    starts = table.starts[first : last + 1]
    rows = slice(int(starts[0]), int(starts[-1]))
    arrays = table.columns.arrays
    offsets = np.stack([arrays["video_offset"][rows], arrays["json_offset"][rows]], 1)
    sizes = np.stack([arrays["video_size"][rows], arrays["json_size"][rows]], 1)
    order = np.argsort(offsets, 1)
    offsets, sizes = np.take_along_axis(offsets, order, 1).ravel(), np.take_along_axis(sizes, order, 1).ravel()
    until = offsets + -(-sizes // BLOCK) * BLOCK
    before = np.concatenate([np.zeros(1, np.int64), until[:-1]])
    before[2 * (starts[:-1] - starts[0])] = 0
    limit = np.repeat(num_bytes[first:last], 2 * np.diff(starts))
    wrong = (offsets - BLOCK < before) | (offsets % BLOCK != 0) | (offsets + sizes > limit)
    ends: NDArray[np.int64] = until[2 * (starts[1:] - starts[0]) - 1]
    places = np.flatnonzero(wrong) // 2 + starts[0]
    for number in np.unique(np.searchsorted(table.starts, places, "right") - 1).tolist():
        ends[number - first] = _end_in_any_order(table, number, int(num_bytes[number]))
    return ends


def _end_in_any_order(table: Table, number: int, num_bytes: int) -> int:
    """The same of one shard whose members stand in another order than its rows. ShardError for spans that cannot be."""
    refs = [table.ref(row) for row in range(int(table.starts[number]), int(table.starts[number + 1]))]
    spans = [(ref.video_offset, ref.video_size, ref) for ref in refs]
    spans += [(ref.json_offset, ref.json_size, ref) for ref in refs]
    spans.sort(key=lambda span: span[0])
    end = 0
    for offset, size, ref in spans:
        if offset - BLOCK < end or offset % BLOCK or offset + size > num_bytes:
            raise ShardError(
                f"{index_path(table.shards[number])}: clip {ref.key!r} spans bytes {offset} to {offset + size}, but "
                f"the tar has {num_bytes} bytes and the member before ends at {end}; delete the index, or {CURE}"
            )
        end = offset + padded(size)
    return end


def _look(table: Table, number: int, end: int, num_bytes: int) -> None:
    shard = table.shards[number]
    for row in (int(table.starts[number]), int(table.starts[number + 1]) - 1):
        member = table.ref(row).video
        check_header(shard, member, read_range(shard, member.offset - BLOCK, BLOCK))
    if end + BLOCK > num_bytes or read_range(shard, end, BLOCK) != bytes(BLOCK):
        raise ShardError(
            f"{shard}: the index ends at byte {end}, the tar goes on to {num_bytes}, or breaks off; "
            f"delete the index, or {CURE}"
        )
