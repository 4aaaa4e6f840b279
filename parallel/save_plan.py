"""Which rank writes which part of a checkpoint.

Parts that several ranks hold (replicas of HSDP, parameters that tensor parallelism leaves whole, what several
pipeline stages have) are written once, by the holder that has least to write so far. Every rank makes the same plan
from the same list, so ranks talk once a run and not at every save.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.dtensor import Box, as_box, local_box
from parallel.exchange import exchange
from parallel.manifest import CheckpointError
from parallel.shard_file import Part, in_file_order


class Held(NamedTuple):
    """What a rank holds of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    box: Box

    @property
    def num_bytes(self) -> int:
        return self.box.numel * as_dtype(self.dtype).itemsize


class SavePlan(NamedTuple):
    """`tensors`: name -> shape and dtype, of all ranks together; `parts`: what each rank writes, in file order."""

    tensors: dict[str, dict[str, Any]]
    parts: list[list[Part]]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def as_dtype(name: str) -> torch.dtype:
    """Of a name as `dtype_name` gives it."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def signature(tensors: Mapping[str, Tensor]) -> list[tuple[Any, ...]]:
    """What a plan depends on, told faster than the parts themselves."""
    return [
        (name, t.shape, t.dtype, (t.placements, id(t.device_mesh)) if isinstance(t, DTensor) else None)
        for name, t in tensors.items()
    ]


def held(tensors: Mapping[str, Tensor]) -> list[Held]:
    """What this rank holds of tensors given as plain ones or as DTensors."""
    return [Held(name, dtype_name(t.dtype), tuple(t.shape), local_box(t)) for name, t in tensors.items()]


def told_by_all(own: list[Held]) -> list[list[Held]]:
    """What each rank holds, by rank. Collective."""
    told = exchange(own)
    return [[Held(name, dtype, tuple(shape), as_box(box)) for name, dtype, shape, box in parts] for parts in told]


def make_plan(of_ranks: Sequence[Sequence[Held]]) -> SavePlan:
    """Divide the writing. Raises CheckpointError where the ranks do not hold the tensors whole or differ about them."""
    tensors: dict[str, dict[str, Any]] = {}
    holders: dict[tuple[str, Box], list[int]] = {}
    known: dict[tuple[str, Box], Held] = {}
    for rank, parts in enumerate(of_ranks):
        for part in parts:
            facts = {"shape": list(part.shape), "dtype": part.dtype}
            if tensors.setdefault(part.name, facts) != facts:
                raise CheckpointError(
                    f"rank {rank} holds {part.name} as {part.dtype} {part.shape}, another rank as "
                    f"{tensors[part.name]['dtype']} {tuple(tensors[part.name]['shape'])}; names must be those of one "
                    "model on every rank"
                )
            if part.box.numel:
                holders.setdefault((part.name, part.box), []).append(rank)
                known[part.name, part.box] = part
    _check_whole(tensors, holders)
    written: list[list[Part]] = [[] for _ in of_ranks]
    load = [0] * len(of_ranks)
    # What only one rank has, then the rest from the largest down: the loads come out even.
    for key in sorted(holders, key=lambda k: (len(holders[k]) > 1, -known[k].num_bytes, k)):
        rank = min(holders[key], key=lambda r: (load[r], r))
        part = known[key]
        load[rank] += part.num_bytes
        written[rank].append(Part(part.name, as_dtype(part.dtype), part.box))
    return SavePlan(tensors, [in_file_order(parts) for parts in written])


def _check_whole(tensors: Mapping[str, Any], holders: Mapping[tuple[str, Box], Sequence[int]]) -> None:
    covered = dict.fromkeys(tensors, 0)
    for name, box in holders:
        covered[name] += box.numel
    for name, facts in tensors.items():
        numel = torch.Size(facts["shape"]).numel()
        if covered[name] != numel:
            raise CheckpointError(
                f"the ranks hold {covered[name]} numbers of {name}, which has {numel}: every part must be on some rank "
                "and parts may not overlap; save it from the ranks of one layout"
            )
