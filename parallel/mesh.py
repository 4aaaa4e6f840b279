"""From a layout to the process groups of this rank.

One `DeviceMesh` of four dims (pipeline, replicate, zero, tensor) is the root: `zero` is shard x sequence
flattened, because a sequence rank holds different tokens of the same rows and its gradients are averaged like those
of other rows (the gradient rule, `parallel/sequence.py`). `sequence` and `shard` are the two factors of it.
"""

import os
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.layout import Layout, LayoutError, divisors, refuse, words


@dataclass(frozen=True)
class Mesh:
    """The meshes of this rank; `pipeline`, `shard`, `sequence` and `tensor` have one dim.

    `data_rank` is its place along replicate x shard; `ring` x `ulysses` is `sequence` unflattened, where that was
    asked for.
    """

    layout: Layout
    root: DeviceMesh
    pipeline: DeviceMesh
    shard: DeviceMesh
    sequence: DeviceMesh
    tensor: DeviceMesh
    data_rank: int
    ring: DeviceMesh | None = None
    ulysses: DeviceMesh | None = None

    @property
    def rows(self) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """The two groups that lead to all other rows of the batch, in the order of `data_rank`: first shard."""
        return self.shard.get_group(), self.root["replicate"].get_group()

    @property
    def zero(self) -> DeviceMesh:
        """What parameters are sharded over (1 dim), below a dim of replicas where there are any (2 dims)."""
        return self.root["replicate", "zero"] if self.layout.replicate > 1 else self.root["zero"]


def ranks_per_node() -> int | None:
    """As torchrun tells it, or None without it."""
    told = os.environ.get("LOCAL_WORLD_SIZE")
    return int(told) if told else None


def build_mesh(layout: Layout, device_type: str, ranks_per_node: int | None = None, ulysses: int = 0) -> Mesh:
    """The mesh of a layout over all ranks of the default process group, which must exist.

    `ulysses` neighbours of a sequence group are its inner part in the kind ulysses_ring; 0 for every other kind.

    Raises LayoutError where the layout does not fit the ranks or the nodes, before any group is made.
    """
    refuse(layout.faults(dist.get_world_size(), ranks_per_node))
    if ulysses and layout.sequence % ulysses:
        raise LayoutError(
            [
                f"parallel.ulysses={ulysses} does not divide parallel.sequence={layout.sequence}; "
                f"use one of {words(divisors(layout.sequence))}"
            ]
        )
    zero = layout.shard * layout.sequence
    root = init_device_mesh(
        device_type,
        (layout.pipeline, layout.replicate, zero, layout.tensor),
        mesh_dim_names=("pipeline", "replicate", "zero", "tensor"),
    )
    parts = root["zero"]._unflatten(0, (layout.shard, layout.sequence), ("shard", "sequence"))
    data_rank = root.get_local_rank("replicate") * layout.shard + parts.get_local_rank("shard")
    meshes = (root, root["pipeline"], parts["shard"], parts["sequence"], root["tensor"])
    if not ulysses:
        return Mesh(layout, *meshes, data_rank)
    combined = parts["sequence"]._unflatten(0, (layout.sequence // ulysses, ulysses), ("ring", "ulysses"))
    return Mesh(layout, *meshes, data_rank, combined["ring"], combined["ulysses"])
