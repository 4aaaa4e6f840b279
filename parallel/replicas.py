"""Replicated parameters (ZeRO level 0): gradients averaged over the replicas in buckets, while backward still runs.

The same idea as PyTorch DDP (2006.15704, section 3.2.3), for parameters that may be DTensors of a tensor axis: DDP's
reducer takes plain tensors only, and torch's `replicate` keeps a second copy of every parameter.

A bucket is sent when all its gradients are there and those before it are sent, so every rank sends in one
order whatever order its gradients come in. With the gradients go flags that say which of them a rank has: one
that no rank has stays None, as in one process. Averaging twice changes nothing, so a backward pass outside of
`zero_micro_batch` is right too.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.device_mesh import DeviceMesh

from parallel.dtensor import local

BUCKET_BYTES = 25 * 2**20  # DDP's: large enough for the bandwidth, small enough to start early


@dataclass
class _Bucket:
    parameters: list[nn.Parameter]
    ready: set[int] = field(default_factory=set)
    sent: Tensor | None = None
    work: Any = None


class Replicas:
    """Averages the gradients of a module's parameters over all dims of `mesh`; `armed` says whether backward does.

    roots: the modules that are called. reduce_dtype: what is sent; None is the gradients' own.
    """

    def __init__(
        self,
        module: nn.Module,
        roots: Sequence[nn.Module],
        mesh: DeviceMesh,
        reduce_dtype: torch.dtype | None,
        bucket_bytes: int = BUCKET_BYTES,
    ):
        flat = mesh if mesh.ndim == 1 else mesh._flatten()
        self.group, self.size = flat.get_group(), flat.size()
        self.module, self.reduce_dtype, self.bucket_bytes = module, reduce_dtype, bucket_bytes
        self.armed, self.reduced, self.queued, self.next = True, False, False, 0
        self.buckets: list[_Bucket] | None = None
        # Parameters get memory, and become other objects, after this; the first forward is late enough.
        for root in roots:
            root.register_forward_pre_hook(self._before_forward)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.prepare()

    def prepare(self) -> list[_Bucket]:
        """Buckets of the trainable parameters, last ones first as backward meets them, and a hook on each."""
        if self.buckets is None:
            self.buckets = buckets([p for p in self.module.parameters() if p.requires_grad], self.bucket_bytes)
            for number, bucket in enumerate(self.buckets):
                for parameter in bucket.parameters:
                    parameter.register_post_accumulate_grad_hook(self._arrived(number))  # type: ignore[no-untyped-call]
        return self.buckets

    def _arrived(self, number: int) -> Any:
        # A parameter holds its hooks in C++, where Python sees no cycle: a strong reference would keep both for ever.
        replicas = weakref.ref(self)

        def hook(parameter: Tensor) -> None:
            if (own := replicas()) is not None and own.armed:
                own._take(own.prepare()[number], parameter)

        return hook

    def _take(self, bucket: _Bucket, parameter: Tensor) -> None:
        """A gradient has come."""
        if not self.queued:
            self.queued = True
            Variable._execution_engine.queue_callback(self.finish)
        bucket.ready.add(id(parameter))
        if len(bucket.ready) == len(bucket.parameters):
            self._send_in_order()

    def _send_in_order(self) -> None:
        waiting = self.prepare()
        while self.next < len(waiting) and len(waiting[self.next].ready) == len(waiting[self.next].parameters):
            self._send(waiting[self.next])
            self.next += 1

    @torch.no_grad()
    def _send(self, bucket: _Bucket) -> None:
        grads = [local(p.grad) if p.grad is not None else None for p in bucket.parameters]
        dtype = self.reduce_dtype or bucket.parameters[0].dtype
        parts = [
            torch.zeros_like(local(p), dtype=dtype).flatten() if g is None else g.flatten().to(dtype)
            for p, g in zip(bucket.parameters, grads, strict=True)
        ]
        has = torch.tensor([g is not None for g in grads], dtype=dtype).to(parts[0].device, non_blocking=True)
        bucket.sent = torch.cat((*parts, has))
        bucket.work = dist.all_reduce(bucket.sent, group=self.group, async_op=True)

    @torch.no_grad()
    def finish(self) -> None:
        """Send what is not sent yet, and put the means into the gradients."""
        everything = self.prepare()
        for bucket in everything[self.next :]:
            self._send(bucket)
        for bucket in everything:
            bucket.work.wait()
            assert bucket.sent is not None
            self._write(bucket.parameters, bucket.sent)
            bucket.sent, bucket.work = None, None
            bucket.ready.clear()
        self.next, self.queued, self.reduced = 0, False, True

    def _write(self, parameters: list[nn.Parameter], sent: Tensor) -> None:
        locals_ = [local(p) for p in parameters]
        *parts, has = torch.split(sent, [*(p.numel() for p in locals_), len(parameters)])
        if any(p.grad is None for p in parameters):
            for parameter, count in zip(parameters, has.tolist(), strict=True):
                if parameter.grad is None and count:
                    parameter.grad = torch.zeros_like(parameter)
        grads, means = [], []
        for parameter, part in zip(parameters, parts, strict=True):
            if parameter.grad is not None:
                grads.append(local(parameter.grad))
                means.append(part.view_as(grads[-1]))
        if grads:
            torch._foreach_copy_(grads, means)
            torch._foreach_div_(grads, self.size)


def buckets(parameters: Sequence[nn.Parameter], most_bytes: int) -> list[_Bucket]:
    """Neighbours of one dtype and device in buckets of at most `most_bytes` (or one parameter), the last ones first."""
    found: list[_Bucket] = []
    size, kind = 0, None
    for parameter in reversed(parameters):
        held = local(parameter)
        if not found or size + held.nbytes > most_bytes or kind != (held.dtype, held.device):
            found.append(_Bucket([]))
            size, kind = 0, (held.dtype, held.device)
        found[-1].parameters.append(parameter)
        size += held.nbytes
    return found
