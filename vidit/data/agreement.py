"""Does an index belong to its tars? Every place and size is compared with the tar's, three headers are looked at.

Of each shard the headers of the first and the last clip and the zeros at the end are read; every other header is
compared when its clip is. Of many remote shards, where each look is a request, some are looked at.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vidit.data.clip_list import Table
from vidit.data.manifest import index_path
from vidit.data.remote import STREAMS
from vidit.data.storage import File
from vidit.data.tar import BLOCK, CURE, Member, ShardError, check_header, padded

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
    video, caption, video_size, caption_size = (
        arrays[name][rows] for name in ("video_offset", "json_offset", "video_size", "json_size")
    )
    first_is_video = video < caption
    offsets = np.stack([np.minimum(video, caption), np.maximum(video, caption)], 1).ravel()
    sizes = np.where(first_is_video, [video_size, caption_size], [caption_size, video_size]).T.ravel()
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
    shard, arrays = table.shards[number], table.columns.arrays
    members = []
    for row in (int(table.starts[number]), int(table.starts[number + 1]) - 1):
        suffix = table.columns.suffixes[arrays["video_suffix"][row]]
        offset, size = int(arrays["video_offset"][row]), int(arrays["video_size"][row])
        members.append(Member(f"{table.columns.keys[row]}.{suffix}", offset, size))
    *headers, last = _blocks_at(shard, [*(member.offset - BLOCK for member in members), end])
    for member, header in zip(members, headers, strict=True):
        if not _is_header_of(member, header):
            check_header(shard, member, header)
    if end + BLOCK > num_bytes or last != bytes(BLOCK):
        raise ShardError(
            f"{shard}: the index ends at byte {end}, the tar goes on to {num_bytes}, or breaks off; "
            f"delete the index, or {CURE}"
        )


def _blocks_at(file: File, offsets: Sequence[int]) -> list[bytes]:
    """A block at each offset; of a local file fewer bytes where it ends."""
    if not isinstance(file, Path):
        size = file.parent.size(file.name)
        return [file.read_range(offset, BLOCK) if offset + BLOCK <= size else b"" for offset in offsets]
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return [os.pread(descriptor, BLOCK, offset) for offset in offsets]
    finally:
        os.close(descriptor)


def _is_header_of(member: Member, header: bytes) -> bool:
    """Whether a header is, byte for byte, as tarfile writes a plain one: a tenth of the time of taking it apart."""
    if header[124:136] != b"%011o\0" % min(member.size, 8**11 - 1):
        return False
    if member.name.isascii() and len(member.name) <= 98 and header[:100].rstrip(b"\0") != member.name.encode():
        return False
    total = sum(header[:148]) + 8 * ord(" ") + sum(header[156:BLOCK])
    return header[148:156] == b"%06o\0 " % total
