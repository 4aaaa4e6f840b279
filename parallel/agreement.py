"""What every rank knows: one value from each, and one error for all.

A fault that only one rank sees (a full disk, a damaged file) would leave the others in a collective for ever. So
what may fail is tried on each rank and its outcome exchanged, and every rank goes on or raises the same message.
Without a process group there is one rank.
"""

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    """Of the default process group; 0 without one."""
    return dist.get_rank() if _distributed() else 0


def world() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if _distributed() else 1


def everyone(value: T) -> list[T]:
    """The value of each rank, by rank. A collective of small picklable things between ranks of one run."""
    if world() == 1:
        return [value]
    found: list[T | None] = [None] * world()
    dist.all_gather_object(found, value)
    return found  # type: ignore[return-value]


def first_fault(fault: str | None) -> str | None:
    """The fault of the lowest rank that has one, which is named where there are several ranks. Collective."""
    faults = everyone(fault)
    for number, text in enumerate(faults):
        if text is not None:
            return text if len(faults) == 1 else f"rank {number}: {text}"
    return None


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
