"""What ranks tell one another between steps: small reports as JSON, decisions that all take alike, shared failures.

A rank that fails or leaves by itself lets the others wait for it until the timeout. So whatever one rank may meet
alone (a damaged file, a full disk, a signal) is done `together`: all leave the block, with the same error if one had
any. Nothing is pickled; tensors lie on the CPU, so the group needs a CPU backend (gloo) on every device.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from parallel.failure import RankError

T = TypeVar("T")
Group = dist.ProcessGroup | None


def several() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def own_rank() -> int:
    """This process's number among all ranks; 0 where it is alone."""
    return dist.get_rank() if several() else 0


def num_ranks() -> int:
    return dist.get_world_size() if several() else 1


def exchange(report: T, groups: Sequence[Group] = (None,)) -> list[T]:
    """Every rank's report, in the order of the ranks; a report is what JSON holds.

    `groups` lead to the ranks that tell, first the group whose ranks are nearest; by default all ranks do.
    """
    told = [report]
    for group in groups:
        told = [one for some in _exchange(told, group) for one in some]
    return told


def _exchange(report: T, group: Group) -> list[T]:
    if not several() or dist.get_world_size(group) == 1:
        return [report]
    size = dist.get_world_size(group)
    own = torch.frombuffer(bytearray(json.dumps(report).encode()), dtype=torch.uint8)
    lengths = torch.empty(size, dtype=torch.int64)
    dist.all_gather(list(lengths.view(size, 1)), torch.tensor([len(own)]), group=group)
    longest = int(lengths.max())
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(own)] = own
    told = torch.empty(size * longest, dtype=torch.uint8)
    dist.all_gather(list(told.view(size, longest)), padded, group=group)
    rows = told.view(size, longest)
    return [json.loads(row[:n].numpy().tobytes()) for row, n in zip(rows, lengths.tolist(), strict=True)]


def first_fault(fault: str | None) -> str | None:
    """The fault of the lowest rank that has one, which is named where there are several ranks; None without any."""
    faults = exchange(fault)
    for rank, text in enumerate(faults):
        if text is not None:
            return text if len(faults) == 1 else f"rank {rank}: {text}"
    return None


def in_order(told: list[list[T]]) -> list[T]:
    """What ranks tell of work that was dealt to them in rounds, as one list: round by round, rank by rank."""
    return [one for of_one_round in zip(*told, strict=True) for one in of_one_round]


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank: the same answer on all."""
    if not several():
        return flag
    seen = torch.tensor([int(flag)])
    dist.all_reduce(seen, dist.ReduceOp.MAX)
    return bool(seen.item())


def same_everywhere(text: str) -> bool:
    """Whether all ranks give the same text: the same answer on all."""
    if not several():
        return True
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())
    extremes = torch.tensor([number, -number])
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    return bool(extremes[0] == -extremes[1])


def from_first(call: Callable[[], T]) -> T:
    """What `call` returns on rank 0, which alone runs it, on every rank; its error is raised on every rank."""
    with together():
        value = call() if own_rank() == 0 else None
    told: list[Any] = exchange(value)
    return cast(T, value if own_rank() == 0 else told[0])  # on rank 0 as it was, not as JSON gives it back


@contextmanager
def together() -> Iterator[None]:
    """Leave when all ranks are through; if one failed in here, with its own error there and RankError elsewhere.

    What is inside must not wait for other ranks. The failing rank's error counts that has the lowest number.
    """
    if not several():
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as failure:
        error = failure
    if not any_rank(error is not None):
        return
    failures: list[str | None] = exchange(None if error is None else str(error) or type(error).__name__)
    if error is not None:
        error.shared = True  # type: ignore[attr-defined]
        raise error
    rank = next(rank for rank, message in enumerate(failures) if message is not None)
    told = RankError(rank, failures[rank] or "")
    told.shared = True
    raise told
