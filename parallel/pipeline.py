"""Pipeline parallelism on torch.distributed.pipelining: stages of one module on the ranks of a mesh.

Training runs a schedule of torch (`parallel/stages.py` says which) over the micro-batches of one optimizer step. What
travels between stages is one tensor, the tokens; everything else each stage is handed on its own rank. A pass
without gradient (`forward`) goes through the same stages in order and ends on every rank.

Parameters that several stages hold (`shared`) are replicas: after the backward passes their gradients are summed over
the pipeline, and they stay bit for bit the same because every rank makes the same update.
Under FSDP2 gradients are kept whole until the last backward pass of the step and reduced once, on every level of ZeRO.
Each schedule keeps one buffer of tokens, and one of their gradient, for every micro-batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from parallel.deferred import WeightGradients
from parallel.dtensor import local
from parallel.stages import Schedule, is_v, rank_of_stage

MicroBatch = Mapping[str, Any]
"""The keyword arguments of a stage's module for one micro-batch."""


@dataclass(frozen=True)
class Shape:
    """Sizes and dtype of a tensor that is yet to come."""

    sizes: tuple[int, ...]
    dtype: torch.dtype

    def empty(self, device: torch.device | str) -> Tensor:
        return torch.empty(self.sizes, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Shapes:
    """Of one micro-batch on this rank: what enters the first stage, what each stage but the last hands on, the output.

    Ranks of one stage may hold different numbers of tokens, and one rank different ones after different stages.
    """

    first: Shape
    between: tuple[Shape, ...]
    last: Shape

    def entering(self, stage: int) -> Shape:
        return self.between[stage - 1] if stage else self.first

    def leaving(self, stage: int) -> Shape:
        return self.between[stage] if stage < len(self.between) else self.last


class Pipeline:
    """The stages of this rank, and the ways through all of them.

    Args:
        stages: number of a stage of this rank -> module, called as module(x, **micro_batch) -> Tensor.
        module: what holds the parameters of all of them.
        mesh: the ranks of the pipeline (1 dim), which must all make this object at the same time.
        weights: with zero_bubble, where the modules put off their weight gradients.
        timeout: of the process group that this makes; None is that of the backend.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        module: nn.Module,
        mesh: DeviceMesh,
        schedule: Schedule,
        device: torch.device,
        weights: WeightGradients | None = None,
        timeout: timedelta | None = None,
    ):
        self.stages, self.module, self.mesh, self.schedule = stages, module, mesh, schedule
        self.device, self.weights = device, weights
        self.ranks = rank_of_stage(schedule, mesh.size(), len(stages))
        self.rank = mesh.get_local_rank()
        expected = [stage for stage, rank in enumerate(self.ranks) if rank == self.rank]
        if sorted(stages) != expected:
            raise ValueError(f"rank {self.rank} of the pipeline was given stages {sorted(stages)}, not {expected}")
        self.group = mesh.get_group()
        # Two ranks that send to each other need a channel for each direction: NCCL runs a channel in order.
        self.back = self.group
        if len(stages) > 1:
            everyone = dist.get_process_group_ranks(self.group)
            back = dist.new_group(everyone, timeout=timeout, use_local_synchronization=True)
            self.back = cast(dist.ProcessGroup, back)
        self._built: dict[tuple[Shapes, int], Any] = {}

    @property
    def is_first(self) -> bool:
        return 0 in self.stages

    @property
    def is_last(self) -> bool:
        return len(self.ranks) - 1 in self.stages

    def forward_backward(
        self,
        inputs: Sequence[Tensor | None],
        micro_batches: Sequence[MicroBatch],
        shapes: Shapes,
        loss: Callable[[Tensor, int], Tensor],
    ) -> None:
        """Forward and backward of all micro-batches of a step; gradients are added up in the parameters.

        Args:
            inputs: of the first stage, read on its rank.
            loss: (output, number of the micro-batch) -> scalar to differentiate, called on the last stage's rank.
        """
        num = len(micro_batches)
        built = self._built.get((shapes, num))
        if built is None:
            built = self._built[shapes, num] = self._build(shapes, num)
        schedule, stages = built
        schedule._loss_fn = loss
        for stage in stages:
            stage.has_backward = True
            stage.clear_runtime_states()
        with _reduced_at_the_end(self.module):
            schedule._step_microbatches(
                [(x,) if self.is_first else () for x in inputs],
                [dict(micro_batch) for micro_batch in micro_batches],
                list(range(num)),
                return_outputs=False,
            )
        for stage in stages:
            stage.clear_runtime_states()

    def _build(self, shapes: Shapes, num: int) -> tuple[Any, list[PipelineStage]]:
        stages: list[PipelineStage] = []
        for number, module in sorted(self.stages.items()):
            entering = shapes.entering(number).empty("meta").requires_grad_(number > 0)
            leaving = shapes.leaving(number).empty("meta").requires_grad_()
            builder = self.weights.take if self.weights else None
            stage = _Stage(
                module, number, len(self.ranks), self.device, entering, leaving, group=self.group, dw_builder=builder
            )
            stages.append(stage)
        options: dict[str, Any] = {"n_microbatches": num, "loss_fn": _not_yet, "scale_grads": False}
        if self.schedule == "gpipe":
            return ScheduleGPipe(stages[0], **options), stages
        if self.schedule == "1f1b":
            return Schedule1F1B(stages[0], **options), stages
        if self.schedule == "interleaved":
            return ScheduleInterleaved1F1B(cast(Any, stages), **options), stages
        kind = ScheduleZBVZeroBubble if is_v(self.schedule, len(stages)) else ScheduleInterleavedZeroBubble
        return kind(cast(Any, stages), **options), stages

    @torch.no_grad()
    def forward(
        self, inputs: Sequence[Tensor | None], micro_batches: Sequence[MicroBatch], shapes: Shapes
    ) -> list[Tensor]:
        """The output of each micro-batch, on every rank of the pipeline; a collective call."""
        outputs: list[Tensor] = []
        handed: list[Tensor] = []
        sends: list[tuple[dist.Work | None, Tensor]] = []
        for number, module in sorted(self.stages.items()):
            entering = self._entering(number, inputs, handed, shapes.entering(number))
            handed = []
            for micro_batch, x in zip(micro_batches, entering, strict=True):
                out = module(x, **micro_batch)
                if number == len(self.ranks) - 1:
                    outputs.append(out)
                elif self.ranks[number + 1] == self.rank:
                    handed.append(out)
                else:
                    sends.append(self._send(out.contiguous(), number))
        for work, _ in sends:
            if work is not None:
                work.wait()
        return self.from_last(outputs, [shapes.last] * len(micro_batches))

    def from_last(self, tensors: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """What the last stage's rank holds, on every rank; the others give shapes alone."""
        found = []
        for place, shape in enumerate(shapes):
            x = tensors[place].detach().contiguous() if self.is_last else shape.empty(self.device)
            dist.broadcast(x, group=self.group, group_src=self.ranks[-1])
            found.append(x)
        return found

    def _channel(self, number: int) -> dist.ProcessGroup:
        """For what stage `number` hands on."""
        return self.group if self.ranks[number + 1] > self.ranks[number] else self.back

    def _send(self, x: Tensor, number: int) -> tuple[dist.Work | None, Tensor]:
        return dist.isend(x, group=self._channel(number), group_dst=self.ranks[number + 1]), x

    def _entering(
        self, number: int, inputs: Sequence[Tensor | None], handed: Sequence[Tensor], shape: Shape
    ) -> Iterator[Tensor | None]:
        """What enters a stage, micro-batch by micro-batch; the next one is on its way meanwhile."""
        if number == 0:
            yield from inputs
        elif self.ranks[number - 1] == self.rank:
            yield from handed
        else:
            channel, source = self._channel(number - 1), self.ranks[number - 1]
            coming: list[tuple[dist.Work | None, Tensor]] = []
            for place in range(len(inputs) + 1):
                if place < len(inputs):
                    x = shape.empty(self.device)
                    coming.append((dist.irecv(x, group=channel, group_src=source), x))
                if place:
                    work, x = coming.pop(0)
                    if work is not None:
                        work.wait()
                    yield x


class _Stage(PipelineStage):
    """torch 2.11 greets the rank of a neighbouring stage also where that is this rank (V), which gloo refuses."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


def _not_yet(output: Tensor, number: int) -> Tensor:
    raise AssertionError("the loss of a step is given with the step")


@contextmanager
def _reduced_at_the_end(module: nn.Module) -> Iterator[None]:
    """Under FSDP2, gradients added up whole over many backward passes and reduced once, after the last.

    A weight gradient that was put off comes after the hook that would reduce it, so the reduction is called here.
    """
    units = [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
    for unit in units:
        unit.set_is_last_backward(False)
        unit.set_reshard_after_backward(False)
        unit.set_requires_gradient_sync(False)
    yield
    for unit in units:
        unit.set_is_last_backward(True)
        unit.set_reshard_after_backward(True)
        unit.set_requires_gradient_sync(True)
    roots = [fully_shard.state(unit) for unit in units]  # type: ignore[attr-defined]
    for state in roots:
        if state._is_root:
            for inner in reversed(state._state_ctx.all_states):
                for group in _groups(inner):
                    group.post_backward()
            state._root_post_backward_final_callback()


def _groups(state: Any) -> list[Any]:
    """Parameter groups of a unit: one in torch 2.11, a list of them later."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


@torch.no_grad()
def sum_shared(shared: Sequence[nn.Parameter], mesh: DeviceMesh) -> None:
    """Sum the gradients of parameters that every stage holds over the ranks of the pipeline (1 dim), in place.

    Every rank gives the same parameters in the same order. One that has a gradient nowhere keeps none.
    """
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for p in shared:
        if p.requires_grad:
            by_dtype.setdefault(p.dtype, []).append(p)
    for parameters in by_dtype.values():
        held = [local(p if p.grad is None else p.grad) for p in parameters]
        flags = held[0].new_tensor([p.grad is not None for p in parameters])
        own = [torch.zeros_like(x) if p.grad is None else x for p, x in zip(parameters, held, strict=True)]
        together = torch.cat([flags, *(x.reshape(-1) for x in own)])
        together = together.to(mesh.device_type)  # offloaded gradients are on the CPU, the group is not
        dist.all_reduce(together, group=mesh.get_group())
        sums = torch.split(together[len(parameters) :], [x.numel() for x in own])
        for p, somewhere, total in zip(parameters, together[: len(parameters)].tolist(), sums, strict=True):
            if somewhere:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                target = local(p.grad)
                target.copy_(total.reshape(target.shape))
