"""The DiT as a pipeline: the passes of a training step, and of one without gradient, through its stages.

Each rank makes what its stages need from the batch itself: every stage the times and the text, the first the noisy
latents, the last the clean ones for the loss. Between stages only tokens travel. The losses of the rows, and the
estimate of a self-conditioning pass, come from the last stage and are known on every rank of the pipeline.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from parallel.deferred import WeightGradients
from parallel.pipeline import Pipeline, Shape, Shapes, sum_shared
from parallel.stages import Schedule, rank_of_stage
from vidit.data.loader import Batch
from vidit.dtypes import wide
from vidit.model.context import TextContext
from vidit.model.dit import DiT
from vidit.model.linear import Linear
from vidit.model.stage import entering, leaving, shared_parameters, view_of_stage
from vidit.model.windows import Grid
from vidit.text.encoder import TextTokens
from vidit.train.passes import Around, nothing_around
from vidit.train.step import DitStep, Inputs, Losses, TextInputs, Video

OwnTokens = Callable[[tuple[int, int, int], int], int]


def whole_rows(grid: tuple[int, int, int], layer: int) -> int:
    """Of a rank that holds every token."""
    return grid[0] * grid[1] * grid[2]


def own_stages(num_stages: int, schedule: Schedule, mesh: DeviceMesh) -> list[int]:
    """The numbers of the stages that are on this rank of the pipeline."""
    ranks = rank_of_stage(schedule, mesh.size(), num_stages // mesh.size())
    return [stage for stage, rank in enumerate(ranks) if rank == mesh.get_local_rank()]


class PipelinePasses:
    """`Passes` through a pipeline; every rank of it is given the same batches.

    Args:
        model: this rank's part, {"dit"} cut by `keep_stages` to `own_stages`, with everything applied to it, and
            {"text"} where that is trained too.
        stages: the layers of every stage of the pipeline.
        mesh: the pipeline (1 dim).
        own_tokens: (grid in tokens, layer) -> how many of a row's tokens this rank holds behind that block.
        around: entered once around all passes of a step, with True.
        timeout: of a process group that is made here.
    """

    def __init__(
        self,
        model: nn.ModuleDict,
        step: DitStep,
        stages: Sequence[range],
        mesh: DeviceMesh,
        schedule: Schedule,
        own_tokens: OwnTokens = whole_rows,
        around: Around = nothing_around,
        timeout: timedelta | None = None,
    ):
        self.model, self.step, self.mesh, self.around = model, step, mesh, around
        self.stages, self.own_tokens = stages, own_tokens
        self.dit: DiT = model["dit"]  # type: ignore[assignment]
        weights = None
        if schedule == "zero_bubble":
            weights = WeightGradients()
            for module in self.dit.modules():
                if isinstance(module, Linear):
                    weights.apply_to(module)
        beside = nn.ModuleDict({name: module for name, module in model.items() if name != "dit"})
        modules = {
            number: _Stage(step, view_of_stage(self.dit, stages[number], stages[-1].stop), beside)
            for number in own_stages(len(stages), schedule, mesh)
        }
        self.pipeline = Pipeline(modules, model, mesh, schedule, step.device, weights, timeout)
        self.evaluated = nn.ModuleDict({"dit": _PipelinedDit(self), **dict(beside.items())})

    @property
    def shared(self) -> list[nn.Parameter]:
        beside = [p for name, module in self.model.items() if name != "dit" for p in module.parameters()]
        return shared_parameters(self.dit) + beside

    def forward_backward(self, batches: Sequence[Batch]) -> list[Losses]:
        step, pipeline = self.step, self.pipeline
        inputs = [step.inputs(batch, "train") for batch in batches]
        ends = pipeline.is_first or pipeline.is_last
        videos = [step.video(batch, own) if ends else None for batch, own in zip(batches, inputs, strict=True)]
        entering = [self._entering(own, video) for own, video in zip(inputs, videos, strict=True)]
        shapes = self._shapes(len(inputs[0].rows), step.latent_shape, inputs[0].grid, self._num_text(batches[0]))
        rows: dict[int, Tensor] = {}

        def loss(output: Tensor, number: int) -> Tensor:
            video = videos[number]
            assert video is not None
            rows_B = step.loss(output, inputs[number], video).rows_B
            rows[number] = rows_B.detach()
            return rows_B.mean() / len(batches)

        with self.around(True):
            micro_batches = [self._micro_batch(*given) for given in zip(batches, inputs, videos, strict=True)]
            estimates = self._estimates(inputs, videos, entering, micro_batches, shapes)
            for micro_batch, estimate in zip(micro_batches, estimates, strict=True):
                micro_batch["previous"] = estimate
            pipeline.forward_backward(entering, micro_batches, shapes, loss)
        sum_shared(self.shared, self.mesh)
        shape = Shape((len(batches), len(inputs[0].rows)), shapes.last.dtype)
        known = [torch.stack([rows[number] for number in range(len(batches))])] if pipeline.is_last else []
        (all_rows,) = pipeline.from_last(known, [shape])
        return [Losses(rows_B, own.quantile_B, {}) for rows_B, own in zip(all_rows, inputs, strict=True)]

    def _entering(self, inputs: Inputs, video: Video | None) -> Tensor | None:
        if not self.pipeline.is_first:
            return None
        assert video is not None
        return self.step.objective.network_input(video.x_t, inputs.t_B)

    def _micro_batch(self, batch: Batch, inputs: Inputs, video: Video | None) -> dict[str, Any]:
        step, num_clips = self.step, len(batch.clips.keys)
        assert batch.tokens is not None
        tokens = batch.tokens.to(step.device)
        return {
            "grid": inputs.grid if video is None else step.shown(inputs, video),
            "time_B": step.objective.path.time_embedding_input(inputs.times),
            # A frozen encoder runs once for all stages and passes of this rank, a trained one within each.
            "text": step.text(self.model, tokens, num_clips, batch.text) if step.frozen_text is not None else None,
            "tokens": tokens,
            "num_clips": num_clips,
        }

    def _estimates(
        self,
        inputs: Sequence[Inputs],
        videos: Sequence[Video | None],
        entering: Sequence[Tensor | None],
        micro_batches: Sequence[dict[str, Any]],
        shapes: Shapes,
    ) -> list[Tensor | None]:
        """What the first stage is given of a first pass; None stands for zeros, and elsewhere for nothing."""
        estimates: list[Tensor | None] = [None] * len(inputs)
        chosen = [i for i, own in enumerate(inputs) if own.estimated]
        if not chosen:
            return estimates
        outputs = self.pipeline.forward([entering[i] for i in chosen], [micro_batches[i] for i in chosen], shapes)
        for i, output in zip(chosen, outputs, strict=True):
            video = videos[i]
            if self.pipeline.is_first and video is not None:
                estimates[i] = self.step.estimate(output, inputs[i], video)
        return estimates

    def _num_text(self, batch: Batch) -> int:
        """Text tokens of a row: of a row of images every caption's."""
        assert batch.tokens is not None
        return batch.tokens.mask_BL.shape[1] * (1 if batch.images is None else self.step.images_per_row)

    def _shapes(self, rows: int, latent: tuple[int, ...], grid: Grid, num_text: int) -> Shapes:
        c, dtype = self.step.config.model, self.dit.dtype
        beside = num_text if c.is_joint else 0
        tokens = [self.own_tokens(grid.shape, layers[-1]) + beside for layers in self.stages[:-1]]
        return Shapes(
            Shape((rows, *latent), self.step.dtype),
            tuple(Shape((rows, number, c.width), dtype) for number in tokens),
            Shape((rows, *latent), wide(dtype)),
        )


class _Stage(nn.Module):
    """A stage as a schedule calls it: with the text encoder, where that is trained, so that its gradient comes too."""

    def __init__(self, step: DitStep, dit: DiT, beside: nn.ModuleDict):
        super().__init__()
        self.step, self.dit, self.beside = step, dit, beside

    def forward(
        self,
        x: Tensor,
        *,
        grid: Grid,
        time_B: Tensor,
        text: TextInputs | None,
        tokens: TextTokens | None = None,
        num_clips: int = 0,
        previous: Tensor | None = None,
    ) -> Tensor:
        own = self.step.text(self.beside, tokens, num_clips) if text is None else text
        entered = entering(self.dit, x, own.features_BLE.shape[1])
        given = own.features_BLE, own.frame_BL, own.pooled_BE, previous, own.second
        out = leaving(self.dit(entered, grid, time_B, *given))
        return out.contiguous()  # as a stage must promise of what it hands on


class _PipelinedDit(nn.Module):
    """Called like the whole DiT, by every rank of the pipeline with the same arguments; its output on each."""

    def __init__(self, passes: PipelinePasses):
        super().__init__()
        self.passes = passes

    def forward(
        self,
        x: Tensor,
        grid: Grid,
        time_B: Tensor,
        text_BLE: Tensor,
        text_frame_BL: Tensor,
        pooled_BE: Tensor,
        previous_BCTHW: Tensor | None = None,
        second: TextContext | None = None,
    ) -> Tensor:
        text = TextInputs(text_BLE, text_frame_BL, pooled_BE, second)
        micro_batch = {"grid": grid, "time_B": time_B, "text": text, "previous": previous_BCTHW}
        shapes = self.passes._shapes(x.shape[0], tuple(x.shape[1:]), grid, text_BLE.shape[1])
        (output,) = self.passes.pipeline.forward([x], [micro_batch], shapes)
        return output
