"""This rank's own part of a tensor: the plain tensor, and where in the full one it lies."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.shards import local_part


class Box(NamedTuple):
    """A rectangular part of a tensor: where it begins and how long it is, in each dim."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        product = 1
        for size in self.sizes:
            product *= size
        return product

    def overlap(self, other: "Box") -> "Box | None":
        """What both hold, or None."""
        starts = tuple(map(max, self.offsets, other.offsets))
        ends = [min(a + n, b + m) for a, n, b, m in zip(*self, *other, strict=True)]
        sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return Box(starts, sizes) if all(size > 0 for size in sizes) else None

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """The index of this box in a tensor that holds `outer`."""
        starts = [own - first for own, first in zip(self.offsets, outer.offsets, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True))


def as_box(told: Sequence[Sequence[int]]) -> Box:
    """A box as another rank has told of it."""
    offsets, sizes = told
    return Box(tuple(offsets), tuple(sizes))


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory with `tensor`; a plain tensor is its own."""
    return cast(Tensor, tensor.to_local()) if isinstance(tensor, DTensor) else tensor.detach()


def local_box(tensor: Tensor) -> Box:
    """Where this rank's part lies in the full tensor. An empty part may lie anywhere. No communication."""
    if not isinstance(tensor, DTensor):
        return Box((0,) * tensor.ndim, tuple(tensor.shape))
    assert not any(p.is_partial() for p in tensor.placements), "a tensor that is not yet summed over ranks"
    full = torch.empty(tensor.shape, device="meta")
    part = local_part(full, tensor.device_mesh, tensor.placements)
    held = tuple(local(tensor).shape)
    assert tuple(part.shape) == held, f"placements {tensor.placements} give {tuple(part.shape)}, the rank holds {held}"
    place, offsets = int(part.storage_offset()), []
    for stride in full.stride():
        offsets.append(place // stride)
        place %= stride
    return Box(tuple(offsets), held)
