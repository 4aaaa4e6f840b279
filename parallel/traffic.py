"""What each way of sharding must send, as closed formulas: bytes of one rank in a forward and backward pass.

Arithmetic only, no torch. The convention is that of `telemetry.py`: an ideal ring of n ranks, and what stays on a
rank is not counted. B rows of S tokens of width D, `size` bytes an element; activation checkpointing off (with it the
forward pass's part comes once more).

| kind           | a block                                                                    |
|----------------|----------------------------------------------------------------------------|
| ulysses        | q, k, v and the output, forward and backward: 8 exchanges of a rank's share |
| ring           | k and v to n - 1 ranks, forward and backward, and their gradients to n      |
| window         | nothing; where the window changes, the tokens that change their rank        |
| tensor         | each region: the sum forward and backward, of all tokens                    |
| sharded norms  | each region: a gather and a scatter, forward and backward; the AdaLN vectors |
"""

from collections.abc import Iterable, Sequence
from math import prod

Shape = Sequence[int]


def share(count: int, ranks: int) -> int:
    """Entries of each of `ranks` equal parts, padding included."""
    return -(-count // ranks)


def all_gather_bytes(part: float, ranks: int) -> float:
    """From the bytes that each rank has."""
    return (ranks - 1) * part


def reduce_scatter_bytes(whole: float, ranks: int) -> float:
    return (ranks - 1) / ranks * whole


def all_reduce_bytes(whole: float, ranks: int) -> float:
    return 2 * reduce_scatter_bytes(whole, ranks)


def all_to_all_bytes(whole: float, ranks: int) -> float:
    """Of equal parts; from the bytes that each rank has."""
    return (ranks - 1) / ranks * whole


def ulysses_bytes(rows: int, tokens: int, width: int, size: int, ranks: int) -> float:
    """One core. With tensor ranks as well, `width` is the share of the heads."""
    return 8 * all_to_all_bytes(rows * share(tokens, ranks) * width * size, ranks)


def ring_bytes(rows: int, tokens: int, width: int, size: int, wide: int, ranks: int) -> float:
    """One core; gradients travel with `wide` bytes an element, and home in the end."""
    keys_and_values = 2 * rows * share(tokens, ranks) * width
    return 2 * (ranks - 1) * keys_and_values * size + ranks * keys_and_values * wide


def window_bytes(rows: int, leaving: int, arriving: int, width: int, size: int) -> float:
    """One change of window, after which `leaving` of this rank's tokens are on others, and `arriving` were before."""
    return (leaving + arriving) * rows * width * size


def tensor_bytes(
    rows: int, tokens: int, width: int, size: int, ranks: int, regions: int, whole_inputs: int = 0, per_head: int = 0
) -> float:
    """One block of so many regions.

    whole_inputs: elements of what else enters a region and has a gradient (text features).
    per_head: elements of parameters of that kind.
    """
    sums = 2 * regions * rows * tokens * width + whole_inputs + per_head
    return all_reduce_bytes(sums * size, ranks)


def sharded_norms_bytes(
    rows: int, tokens: int, width: int, size: int, ranks: int, regions: int, whole_inputs: int = 0, per_head: int = 0
) -> float:
    """The same with sequence-sharded norms; a block has six AdaLN vectors."""
    moved = 4 * regions * all_gather_bytes(rows * share(tokens, ranks) * width * size, ranks)
    return moved + all_reduce_bytes((6 * rows * width + whole_inputs + per_head) * size, ranks)


def zero_bytes(
    blocks: Iterable[Shape],
    rest: Iterable[Shape],
    ranks: int,
    level: int,
    micro_batches: int,
    size: int,
    reduce_size: int | None = None,
) -> float:
    """One step of a level of ZeRO.

    Args:
        blocks, rest: shapes of the parameters (after tensor parallelism) in the units that repeat, and outside of
            them; shards are of dim 0, padded.
        reduce_size: bytes an element of a gradient on its way; None is `size`.
    """
    blocks, rest = list(blocks), list(rest)
    if level == 0:  # with a flag for each gradient
        elements = sum(prod(shape) + 1 for shape in (*blocks, *rest))
        return all_reduce_bytes(elements * (reduce_size or size), ranks)
    block_part, rest_part = (sum(_part(shape, ranks) for shape in shapes) for shapes in (blocks, rest))
    gathers = {1: 1, 2: micro_batches, 3: micro_batches}[level]
    gathered = (gathers * (2 if level == 3 else 1) * block_part + gathers * rest_part) * size
    scattered = (1 if level == 1 else micro_batches) * (block_part + rest_part) * ranks * (reduce_size or size)
    return all_gather_bytes(gathered, ranks) + reduce_scatter_bytes(scattered, ranks)


def _part(shape: Shape, ranks: int) -> int:
    return share(shape[0], ranks) * prod(shape[1:])
