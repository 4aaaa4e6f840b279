"""Which clip stands at which place: a pure function of (seed, number of clips).

Epoch e is one permutation of the clips, keyed by (seed, e), and place p of the endless stream is entry
p mod n of epoch p // n. So a run resumes at any place in O(1), and every rank and worker count sees the same
stream.
"""

import functools

import numpy as np
from numpy.typing import NDArray

from vidit import keys


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, stream: str, epoch: int, num_clips: int) -> NDArray[np.int64]:
    """The permutation of `num_clips` clips in one epoch."""
    return keys.generator(seed, "order", stream, epoch).permutation(num_clips)


def clip_at(seed: int, stream: str, place: int, num_clips: int) -> int:
    """The clip at a place of the endless stream."""
    epoch, offset = divmod(place, num_clips)
    return int(epoch_order(seed, stream, epoch, num_clips)[offset])


def substitute(seed: int, place: int, attempt: int, num_clips: int) -> int:
    """The clip that stands in for one that does not decode: keyed, so that a resume finds the same."""
    return keys.key(seed, "substitute", place, attempt) % num_clips


def rows_of(micro_batch: int, index: int, rank: int, world: int) -> range:
    """Global row numbers of micro-batch `index` on a rank: rank-contiguous blocks of each round."""
    start = (index * world + rank) * micro_batch
    return range(start, start + micro_batch)


def split_places(rows: range, image_rows: int) -> tuple[range, range]:
    """Places in the stream of clips of the video rows of one micro-batch, and in that of images of its image rows.

    The last `image_rows` rows hold images. Places count each stream without gaps, so that an epoch of clips
    leaves none out.
    """
    block, video_rows = rows.start // len(rows), len(rows) - image_rows
    return (
        range(block * video_rows, (block + 1) * video_rows),
        range(block * image_rows, (block + 1) * image_rows),
    )
