"""ZeRO (1910.02054) by FSDP2 over replicas and the flattened shard x sequence ranks.

A sequence rank holds other tokens of the same rows, and every parameter's gradient is the mean over data and
sequence ranks, so both are one axis here. Parameters that tensor parallelism has divided are divided further.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from parallel.names import modules


def apply_zero(
    module: nn.Module,
    blocks: Sequence[str],
    mesh: DeviceMesh,
    keep_gathered: bool = False,
    reduce_dtype: torch.dtype | None = None,
) -> None:
    """Shard the parameters of `module`, in place: each module that fits `blocks` as one unit, the rest as another.

    Args:
        mesh: 1 dim to shard over, or 2 dims, (replicas, shards).
        keep_gathered: keep a unit's whole parameters from forward to backward (ZeRO-2) instead of gathering
            them twice (ZeRO-3).
        reduce_dtype: in which gradients are averaged; None is the parameters' own.

    Raises PlanError where a pattern fits no module.
    """
    policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    for found in modules(module, blocks).values():
        fully_shard(found, mesh=mesh, reshard_after_forward=not keep_gathered, mp_policy=policy)
    fully_shard(module, mesh=mesh, reshard_after_forward=not keep_gathered, mp_policy=policy)
