"""ZeRO (1910.02054) over replicas and the flattened shard x sequence ranks, by FSDP2; level 0 by replication.

A sequence rank holds other tokens of the same rows, and every parameter's gradient is the mean over data and
sequence ranks, so both are one axis here. Parameters that tensor parallelism has divided are divided further.

| level | held between steps         | weights gathered          | gradients summed  | gradients held meanwhile |
|-------|----------------------------|---------------------------|-------------------|--------------------------|
| 0     | everything                 | never                     | once a step       | whole                    |
| 1     | 1/n of weights and moments | once a step               | once a step       | whole                    |
| 2     | 1/n of weights and moments | once a micro-batch        | every micro-batch | 1/n                      |
| 3     | 1/n of weights and moments | twice, block by block     | every micro-batch | 1/n                      |

With replicas (2 dims, HSDP) the shards' gradients are summed over replicas once a step on every level.
Weights are gathered in their own dtype. FSDP2 casts a unit as one, and a block holds fp32 islands (modulation,
QK-norm, the bias table) beside the matrices that compute in bf16: a gather in bf16 would round the islands, and units
of their own for them would hook into the middle of a block that is compiled as one graph.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from functools import wraps
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.utils import _pytree

from parallel.names import modules
from parallel.replicas import Replicas

Level = Literal[0, 1, 2, 3]


@dataclass
class Zero:
    """What `zero_micro_batch` needs to know of a module; kept as its attribute `zero`."""

    level: Level
    replicated: bool
    roots: list[nn.Module]
    units: list[FSDPModule] = field(default_factory=list)
    replicas: Replicas | None = None
    inside: bool = False

    def settle(self) -> None:
        """Give back gathered weights, so that names stand for the shards again."""
        for unit in self.units:
            unit.reshard()


def apply_zero(
    module: nn.Module,
    blocks: Sequence[str],
    mesh: DeviceMesh,
    *,
    level: Level = 3,
    reduce_dtype: torch.dtype | None = None,
    cpu_offload: bool = False,
    methods: Sequence[str] = (),
) -> None:
    """Shard the parameters of `module`, in place: each module that fits `blocks` as one unit, what is left as another.

    Where `module` is a container without a forward (an nn.ModuleDict), each of its members is a root with a unit of its
    own for what is left: it is the members that are called.

    Args:
        mesh: 1 dim to shard over, or 2 dims, (replicas, shards); on level 0 both are replicas.
        reduce_dtype: in which gradients are summed over ranks, and on level 1 over micro-batches; None is the
            parameters' own.
        cpu_offload: keep shards, gradients and optimizer state in CPU memory (levels 1 to 3 on an accelerator).
            Parameters then need `to_empty(device="cpu")`.
        methods: of roots, that are called instead of their forward (`encode`, `decode`), where a root has them.

    Raises PlanError where a pattern fits no module, and ValueError for options that have no effect.
    """
    _refuse(level, mesh, cpu_offload)
    # It warns of work in place on what a root returns, which is done nowhere here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    called = [module] if type(module).forward is not nn.Module.forward else list(module.children())
    zero = Zero(level, mesh.ndim > 1, [root for root in called if any(True for _ in root.parameters())])
    module.zero = zero  # type: ignore[assignment]
    found = list(modules(module, blocks).values())
    if level == 0:
        zero.replicas = Replicas(module, zero.roots, mesh, reduce_dtype)
        return
    policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    for block in found:
        fully_shard(block, mesh=mesh, reshard_after_forward=level == 3, mp_policy=policy, offload_policy=offload)
        zero.units.append(cast(FSDPModule, block))
    for root in zero.roots:
        if isinstance(root, FSDPModule):
            continue
        root.register_forward_hook(_dataclasses_are_trees)
        # Backward needs what is left of a root first and last, so giving it back in between would save nothing.
        fully_shard(root, mesh=mesh, reshard_after_forward=False, mp_policy=policy, offload_policy=offload)
        zero.units.append(cast(FSDPModule, root))
        root.register_forward_hook(_settle_without_gradient(zero))
        for name in (name for name in methods if hasattr(root, name)):
            _called_by(root, name, zero)


def _refuse(level: int, mesh: DeviceMesh, cpu_offload: bool) -> None:
    if level not in (0, 1, 2, 3):
        raise ValueError(f"parallel.zero={level} is no level; use 0 (replicas), 1, 2 or 3")
    if cpu_offload and level == 0:
        raise ValueError("parallel.cpu_offload has no effect with parallel.zero=0: nothing is sharded; use 1, 2 or 3")
    if cpu_offload and mesh.device_type == "cpu":
        raise ValueError("parallel.cpu_offload has no effect on a CPU, whose memory holds everything; leave it out")


def _dataclasses_are_trees(module: nn.Module, args: Any, output: Any) -> None:
    """FSDP2 of torch 2.11 looks for tensors in registered containers only, and would not hook a dataclass's."""
    if is_dataclass(output) and type(output) not in _pytree.SUPPORTED_NODES:
        _pytree.register_dataclass(type(output))


def _settle_without_gradient(zero: Zero) -> Any:
    """A forward hook: no backward pass will give back what this call gathered.

    Else names would stand for gathered weights after a validation, and the next update would not reach them. Within a
    micro-batch (an estimate for self-conditioning) they are kept for the pass that follows.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled() and not zero.inside:
            zero.settle()

    return hook


def _called_by(root: nn.Module, name: str, zero: Zero) -> None:
    """Gather and give back around a method as around forward."""
    register_fsdp_forward_method(root, name)
    method, after = getattr(root, name), _settle_without_gradient(zero)

    @wraps(method)
    def settled(*args: Any, **kwargs: Any) -> Any:
        output = method(*args, **kwargs)
        after(root, args, output)
        return output

    setattr(root, name, settled)


def of_module(module: nn.Module) -> Zero | None:
    """What `apply_zero` noted on the module, if it was applied."""
    zero = module.__dict__.get("zero")
    return zero if isinstance(zero, Zero) else None


@contextmanager
def zero_micro_batch(module: nn.Module, last: bool = True, overlap: bool = True) -> Iterator[None]:
    """Around forward and backward of one micro-batch; `last` is that of the step. No effect without `apply_zero`.

    After the last one every gradient is the mean over ranks of their sums over micro-batches; before it, gradients are
    not to be read. `overlap=False` (level 0) averages at the end instead of during backward: for a pipeline schedule,
    which runs many backward passes inside.
    """
    zero = of_module(module)
    if zero is None:
        yield
        return
    if zero.replicas is not None:
        zero.replicas.prepare()
        zero.replicas.armed, zero.replicas.reduced = last and overlap, False
    for root in zero.roots if zero.level else ():
        _set_flags(cast(FSDPModule, root), zero, last)
    zero.inside = True
    try:
        yield
    finally:
        zero.inside = False
        if zero.replicas is not None:
            zero.replicas.armed = True
    if last:
        if zero.replicas is not None and not zero.replicas.reduced:
            zero.replicas.finish()
        zero.settle()


def _set_flags(root: FSDPModule, zero: Zero, last: bool) -> None:
    root.set_is_last_backward(last)
    if zero.level == 1:
        root.set_requires_gradient_sync(last)
        root.set_reshard_after_backward(last)
    elif zero.replicated:
        root.set_requires_all_reduce(last)
