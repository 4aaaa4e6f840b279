"""The step of packed rows: the noise, time and loss of each clip as if it were a row of a batch.

All that is keyed or drawn is that of the clip's number in the run, and all arithmetic between the latent and the loss
is done token by token, on latents in their packed form. Batches that are no packed rows, those of validation, take the
way of `DitStep`.
"""

from dataclasses import dataclass, fields, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from vidit import keys
from vidit.data.loader import Batch
from vidit.diffusion.density import times_from_uniform
from vidit.diffusion.given import given_frames
from vidit.model.packed import clip_means, packed, per_frame, per_token, tokens_of
from vidit.model.windows import Grid
from vidit.resolve import grid_of
from vidit.train.step import DitStep, Inputs, Losses, TextInputs, Video


@dataclass
class PackedInputs(Inputs):
    """What is known of a packed row: B counts its clips, and `given_BT` is (F,), of the latent frames of them all."""

    @property
    def times(self) -> Tensor:
        """What the network is told: the times of the clips (n,), or of their frames (F,) where some are given."""
        return self.t_B if self.clean is None else per_frame(self.t_B, self.grid).masked_fill(self.clean, 0.0)

    @property
    def t_S(self) -> Tensor:  # noqa: N802
        """The time of each token, given or not."""
        return per_token(self.t_B, self.grid)

    @property
    def clean_S(self) -> Tensor | None:  # noqa: N802
        """Which tokens are of given frames that are shown in the place of noisy ones."""
        return None if self.clean is None else per_token(self.clean, self.grid)


class PackedStep(DitStep):
    """`DitStep` for packed rows too, whose `Video` is (S, P, C) each: tokens in the place of rows."""

    def inputs(self, batch: Batch, purpose: str) -> Inputs:
        own = super().inputs(batch, purpose)
        return PackedInputs(**{field.name: getattr(own, field.name) for field in fields(own)}) if batch.runs else own

    def times(self, batch: Batch, quantile_B: Tensor) -> Tensor:
        if not batch.runs:
            return super().times(batch, quantile_B)
        runs = zip(batch.runs, quantile_B.split([len(clips.keys) for _, clips in batch.runs]), strict=True)
        return torch.cat([
            times_from_uniform(self.config.diffusion, quantile_n, self._shift(*size)) for (size, _), quantile_n in runs
        ])  # fmt: skip

    def grid(self, batch: Batch) -> Grid:
        if not batch.runs:
            return super().grid(batch)
        clips = [shape for size, own in batch.runs for shape in [grid_of(self.config, *size)] * len(own.keys)]
        return replace(packed(clips), fps_B=self.frame_rates(batch.clips.fps))

    def given(self, batch: Batch, purpose: str, grid: Grid) -> Tensor | None:
        if not batch.runs:
            return super().given(batch, purpose, grid)
        kinds, seed = self.config.diffusion.given, self.config.train.seed
        if not kinds or purpose != "train":
            return None
        drawn = [
            given_frames(kinds, frames, keys.generator(seed, "given", row))
            for (frames, _, _), row in zip(grid.clips, batch.rows, strict=True)
        ]
        return torch.tensor([is_given for clip in drawn for is_given in clip], device=self.device)

    def video(self, batch: Batch, inputs: Inputs) -> Video:
        if not isinstance(inputs, PackedInputs):
            return super().video(batch, inputs)
        seed, purpose = self.config.train.seed, f"{inputs.purpose}/noise"
        latents, noises, starts = [], [], accumulate((len(own.keys) for _, own in batch.runs), initial=0)
        for (_, own), start in zip(batch.runs, starts, strict=False):
            x = self.vae.whiten(self._raw(own)).to(self.dtype)
            noise = keys.normal(tuple(x.shape[1:]), seed, purpose, inputs.rows[start : start + len(x)])
            latents.append(tokens_of(x, self.config.model.patch).flatten(0, 1))
            noises.append(tokens_of(noise.to(self.device, self.dtype), self.config.model.patch).flatten(0, 1))
        x, noise = torch.cat(latents), torch.cat(noises)
        x_t = self.objective.path.add_noise(x, noise, inputs.t_S)
        if inputs.clean_S is not None:
            x_t = torch.where(inputs.clean_S[:, None, None], x, x_t)
        return Video(x, noise, x_t)

    def shown(self, inputs: Inputs, video: Video) -> Grid:
        if not isinstance(inputs, PackedInputs) or inputs.given_BT is None or not self.config.model.given_channels:
            return super().shown(inputs, video)
        mask = per_token(inputs.given_BT, inputs.grid)[:, None, None].to(self.dtype)
        beside = torch.cat((video.x_BCTHW * mask, mask.expand(-1, video.x_BCTHW.shape[1], 1)), dim=-1)
        return replace(inputs.grid, given_BCTHW=beside[None])

    def denoise(
        self, model: nn.ModuleDict, x_t: Tensor, t_B: Tensor, text: TextInputs, grid: Grid, previous: Tensor | None
    ) -> Tensor:
        if not grid.clips:
            return super().denoise(model, x_t, t_B, text, grid, previous)
        time_B = self.objective.path.time_embedding_input(t_B)
        x = self.objective.network_input(x_t, per_token(t_B, grid))[None]
        estimate = None if previous is None else previous[None]
        said = text.features_BLE, text.frame_BL, text.pooled_BE
        out: Tensor = model["dit"](x, grid, time_B, *said, estimate, text.second)
        return out[0]

    @torch.no_grad()
    def estimate(self, first: Tensor, inputs: Inputs, video: Video) -> Tensor:
        if not isinstance(inputs, PackedInputs):
            return super().estimate(first, inputs, video)
        assert inputs.chosen_B is not None
        estimate = self.objective.denoised(first, video.x_t, inputs.t_S).to(self.dtype)
        if inputs.clean_S is not None:
            estimate = torch.where(inputs.clean_S[:, None, None], video.x_BCTHW, estimate)
        return estimate * per_token(inputs.chosen_B.to(self.device), inputs.grid).to(estimate.dtype)[:, None, None]

    def loss(self, output: Tensor, inputs: Inputs, video: Video) -> Losses:
        if not isinstance(inputs, PackedInputs):
            return super().loss(output, inputs, video)
        loss_S = self.objective.loss(output, video.x_BCTHW, video.noise, inputs.t_S)
        counted_S = None if inputs.clean_S is None else ~inputs.clean_S
        return Losses(clip_means(loss_S, inputs.grid, counted_S), inputs.quantile_B, {})
