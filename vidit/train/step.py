"""Step functions: a micro-batch -> the loss of each row. The loop is the same for every one of them.

Noise, timesteps and strata are keyed by the row's number in the run (`vidit.keys`), so the loss does not
depend on ranks, accumulation, workers or on what was resumed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from vidit import keys
from vidit.batching import numbers_per_step
from vidit.config import RunConfig
from vidit.data.encoded import StoredText
from vidit.data.loader import Batch
from vidit.data.rows import Clips
from vidit.diffusion.density import shift_for, stratified_uniform, times_from_uniform
from vidit.diffusion.given import given_frames
from vidit.diffusion.objective import Objective, build_objective
from vidit.model.context import EVERY_FRAME, PADDING, TextContext
from vidit.model.windows import Grid
from vidit.resolve import grid_of, resolve
from vidit.text.encoder import TextEncoder, TextFeatures, TextTokens
from vidit.vae.autoencoder import Autoencoder
from vidit.vae.coding import encode_clip


@dataclass
class Losses:
    """Loss of each row (B,), and its place in [0, 1) of the timestep density (B,), 0 where there is none.

    features: of validation, what a network sees in the clips and in what was made of them, (B, D) each, or None.
    """

    rows_B: Tensor
    quantile_B: Tensor
    parts: dict[str, float]
    features: tuple[Tensor, Tensor] | None = None


class Step(Protocol):
    """What the loop needs of a task."""

    device: torch.device

    def __call__(self, model: nn.ModuleDict, batch: Batch, purpose: str) -> Losses: ...

    def updated(self, model: nn.ModuleDict, parts: Mapping[str, float]) -> None:
        """An update was made; `parts` are those of its losses, in the mean over the micro-batches of all ranks."""


@dataclass
class TextInputs:
    """The text of the rows of a batch as the model takes it: (B, L, E), (B, L), (B, E), and of a second encoder."""

    features_BLE: Tensor
    frame_BL: Tensor
    pooled_BE: Tensor
    second: TextContext | None = None


@dataclass
class Inputs:
    """What is known of a batch before a look at its clips: times (B,), their quantiles (B,), the latents in tokens.

    `given_BT` marks the latent frames that are given, None where none is; where frames have times of their own
    (`own_times`), they are clean, at time 0 and without loss.
    `chosen_B` marks the rows that are self-conditioned, on the CPU; None in a model that never is. `estimated` says
    whether a first pass is made: where one of the rows is chosen that are worked on at the same time on all ranks.
    """

    rows: list[int]
    purpose: str
    quantile_B: Tensor
    t_B: Tensor
    grid: Grid
    chosen_B: Tensor | None
    estimated: bool
    given_BT: Tensor | None = None
    own_times: bool = False

    @property
    def times(self) -> Tensor:
        """What the network is told: the times of the rows (B,), or of their frames (B, T) where some are given."""
        return self.t_B if self.clean is None else self.t_B[:, None].masked_fill(self.clean, 0.0)

    @property
    def clean(self) -> Tensor | None:
        """The given frames that are shown in the place of noisy ones."""
        return self.given_BT if self.own_times else None


@dataclass
class Video:
    """Whitened latents, their noise and the mixture of both, each (B, C, T, H, W)."""

    x_BCTHW: Tensor
    noise: Tensor
    x_t: Tensor


def to_pixels(video_BTHW3: Tensor, device: torch.device) -> Tensor:
    """uint8 (n, T, H, W, 3) -> fp32 (n, 3, T, H, W) in [-1, 1]."""
    return rearrange(video_BTHW3.to(device), "n t h w c -> n c t h w").float() / 127.5 - 1


def row_text(features: TextFeatures, num_clips: int, per_row: int) -> TextInputs:
    """Give each row its text: one caption for a clip, `per_row` captions side by side for a row of images.

    Each caption of an image row is visible to its own latent frame only; rows are padded to one length, and
    an image row's pooled text is the mean of its captions'.
    """
    pooled, second = features.pooled_BD, None
    text, frame = _side_by_side(features, num_clips, per_row)
    if features.second is not None:
        second = TextContext(*_side_by_side(features.second, num_clips, per_row))
    if len(pooled) > num_clips:
        of_images = rearrange(pooled[num_clips:], "(r t) e -> r t e", t=per_row).mean(1)
        pooled = torch.cat((pooled[:num_clips], of_images))
    return TextInputs(text, frame, pooled, second)


def _side_by_side(features: TextFeatures, num_clips: int, per_row: int) -> tuple[Tensor, Tensor]:
    """Features (B, L, E) and visibility (B, L) of each row."""
    text, mask = features.features_BLD, features.mask_BL
    frame = torch.where(mask, EVERY_FRAME, PADDING)
    if text.shape[0] == num_clips:
        return text, frame
    images = rearrange(text[num_clips:], "(r t) l e -> r (t l) e", t=per_row)
    own = torch.arange(per_row, device=text.device)[None, :, None]
    image_frame = torch.where(rearrange(mask[num_clips:], "(r t) l -> r t l", t=per_row), own, PADDING).flatten(1)
    extra = images.shape[1] - text.shape[1]
    return (
        torch.cat((nn.functional.pad(text[:num_clips], (0, 0, 0, extra)), images)),
        torch.cat((nn.functional.pad(frame[:num_clips], (0, extra), value=PADDING), image_frame)),
    )


def beside(x_BCTHW: Tensor, given_BT: Tensor) -> Tensor:
    """Given frames, zeros for the others, and behind them a channel that marks them: (B, C + 1, T, H, W)."""
    mask = given_BT[:, None, :, None, None].to(x_BCTHW.dtype)
    return torch.cat((x_BCTHW * mask, mask.expand(-1, 1, -1, *x_BCTHW.shape[3:])), dim=1)


def merged(made: Tensor, stored: Tensor, places: Sequence[int]) -> Tensor:
    """Rows side by side: those of `stored` at their places, those of `made` at all others, in its dtype."""
    total = len(made) + len(stored)
    whole = made.new_empty((total, *made.shape[1:]))
    whole[list(places)] = stored.to(made.dtype)
    whole[[place for place in range(total) if place not in places]] = made
    return whole


def with_stored(
    made: TextFeatures | None, known: TextFeatures, places: Sequence[int], tokens: TextTokens
) -> TextFeatures:
    """Features of all captions: those that are stored at their places, and between them what was made."""
    features, pooled, second = known.features_BLD, known.pooled_BD, None
    if made is not None:
        features, pooled = merged(made.features_BLD, features, places), merged(made.pooled_BD, pooled, places)
    if known.second is not None and tokens.second is not None:
        second = with_stored(None if made is None else made.second, known.second, places, tokens.second)
    return TextFeatures(features, tokens.mask_BL, pooled, second)


class DitStep:
    """Diffusion loss of the denoiser on whitened latents.

    `num_validation` counts the rows of a validation, where that is not `data.num_validation`.
    """

    def __init__(
        self,
        config: RunConfig,
        vae: Autoencoder,
        text: TextEncoder,
        device: torch.device,
        num_validation: int | None = None,
    ):
        self.config, self.vae, self.device = config, vae, device
        self.dtype = torch.float64 if config.train.precision == "fp64" else torch.float32  # of latents and times
        self.num_validation = config.data.num_validation if num_validation is None else num_validation
        self.frozen_text = None if text.trainable else text
        self.objective: Objective = build_objective(config.diffusion)
        r, d = resolve(config), config.data
        self.shift = self._shift(d.num_frames, d.height, d.width)
        self.images_per_row, self.numbers_per_step = r.latent_frames, numbers_per_step(config)
        self.latent_shape = (config.vae.latent_channels, r.latent_frames, r.latent_height, r.latent_width)
        self.tokens = grid_of(config, d.num_frames, d.height, d.width)

    def __call__(self, model: nn.ModuleDict, batch: Batch, purpose: str) -> Losses:
        inputs = self.inputs(batch, purpose)
        video = self.video(batch, inputs)
        text = self.text(model, batch.tokens, len(batch.clips.keys), batch.text)
        previous = self.self_condition(model, inputs, video, text)
        grid = self.shown(inputs, video)
        return self.loss(self.denoise(model, video.x_t, inputs.times, text, grid, previous), inputs, video)

    def updated(self, model: nn.ModuleDict, parts: Mapping[str, float]) -> None:
        """Nothing is remembered of a step."""

    def inputs(self, batch: Batch, purpose: str) -> Inputs:
        """What is known of a batch before a look at its clips."""
        rows, chosen_B, estimated = batch.rows, None, False
        quantile_B = self.quantiles(rows, purpose, batch.step_rows)
        t_B = self.times(batch, quantile_B).to(self.device, self.dtype)
        if share := self.config.denoiser.self_conditioning:
            chosen_B = self._chosen(f"{purpose}/self_condition", rows, share)
            # Ranks that gather weights must go together.
            others = self._chosen(f"{purpose}/self_condition", batch.round_rows, share)
            estimated = purpose != "train" or bool(others.any())
        grid = self.grid(batch)
        if (share := self.config.model.motion_free) and purpose == "train":
            grid = replace(grid, still_B=self._chosen("motion_free", rows, share).to(self.device))
        given_BT = self.given(batch, purpose, grid)
        return Inputs(
            rows, purpose, quantile_B, t_B, grid, chosen_B, estimated, given_BT, self.config.model.frame_times
        )

    def times(self, batch: Batch, quantile_B: Tensor) -> Tensor:
        """Of the rows of a batch, (B,), from their places in the density."""
        shift = self._shift(*batch.size) if batch.size else self.shift
        return times_from_uniform(self.config.diffusion, quantile_B, shift)

    def shown(self, inputs: Inputs, video: Video) -> Grid:
        """The grid of a batch with the frames that the model sees beside the noisy ones."""
        if inputs.given_BT is None or not self.config.model.given_channels:
            return inputs.grid
        return replace(inputs.grid, given_BCTHW=beside(video.x_BCTHW, inputs.given_BT))

    def given(self, batch: Batch, purpose: str, grid: Grid) -> Tensor | None:
        """Which latent frames of each row are given (B, T), in training; None where none may be."""
        kinds, frames = self.config.diffusion.given, grid.frames
        if not kinds or purpose != "train":
            return None
        seed, clips = self.config.train.seed, batch.rows[: len(batch.clips.keys)]
        rows = [given_frames(kinds, frames, keys.generator(seed, "given", row)) for row in clips]
        rows += [[False] * frames] * (len(batch.rows) - len(clips))
        return torch.tensor(rows, device=self.device)

    def _chosen(self, purpose: str, rows: Sequence[int], share: float) -> Tensor:
        return keys.uniform(self.config.train.seed, purpose, list(rows)) < share

    def _shift(self, num_frames: int, height: int, width: int) -> float:
        """Of the timestep density, for clips of that many frames and pixels."""
        frames, h, w = grid_of(self.config, num_frames, height, width)
        return shift_for(self.config.diffusion, h * w, frames, height, width, num_frames)

    def video(self, batch: Batch, inputs: Inputs) -> Video:
        """The clips of a batch, and what the denoiser is given of them."""
        x = self.latents(batch).to(self.dtype)
        seed, purpose = self.config.train.seed, f"{inputs.purpose}/noise"
        noise = keys.normal(tuple(x.shape[1:]), seed, purpose, inputs.rows).to(self.device, self.dtype)
        x_t = self.objective.path.add_noise(x, noise, inputs.t_B)
        if inputs.clean is not None:
            x_t = torch.where(inputs.clean[:, None, :, None, None], x, x_t)
        return Video(x, noise, x_t)

    def loss(self, output: Tensor, inputs: Inputs, video: Video) -> Losses:
        """Of each row, from the network's output for the batch."""
        rows_B = self.objective.loss(output, video.x_BCTHW, video.noise, inputs.t_B, inputs.clean)
        return Losses(rows_B, inputs.quantile_B, {})

    def denoise(
        self,
        model: nn.ModuleDict,
        x_t: Tensor,
        t_B: Tensor,
        text: TextInputs,
        grid: Grid,
        previous: Tensor | None,
    ) -> Tensor:
        """The network's output at x_t; `t_B` is (B, T) where frames have times of their own."""
        time_B = self.objective.path.time_embedding_input(t_B)
        inputs = self.objective.network_input(x_t, t_B)
        return model[self.config.train.task](
            inputs, grid, time_B, text.features_BLE, text.frame_BL, text.pooled_BE, previous, text.second
        )

    def grid(self, batch: Batch) -> Grid:
        """The latents of a batch in tokens, which of its rows are images, and how fast the others run."""
        num_images, image_B = len(batch.rows) - len(batch.clips.keys), None
        if batch.images is not None:
            image_B = torch.arange(len(batch.rows), device=self.device) >= len(batch.clips.keys)
        tokens = self.tokens if batch.size is None else grid_of(self.config, *batch.size)
        return Grid(*tokens, image_B, self.frame_rates([*batch.clips.fps, *[0.0] * num_images]))

    def frame_rates(self, fps: Sequence[float]) -> Tensor | None:
        """Frames a second of rows as the model takes them; None where it takes none."""
        if not self.config.denoiser.frame_rate:
            return None
        return torch.tensor(fps, device=self.device, dtype=self.dtype)

    def latents(self, batch: Batch) -> Tensor:
        """Whitened latents of all rows (B, C, T, H, W): clips, then rows of T one-frame latents."""
        z = self._raw(batch.clips)
        if batch.images is not None:
            pictures = rearrange(self._raw(batch.images), "(r t) c 1 h w -> r c t h w", t=self.images_per_row)
            z = torch.cat((z, pictures))
        return self.vae.whiten(z)

    def _raw(self, clips: Clips) -> Tensor:
        """The posterior mean of clips or images: made of pixels, or taken where it is stored."""
        stored = None if clips.latents is None else clips.latents.to(self.device)
        if clips.pixels is None:
            assert stored is not None
            return stored
        mean = encode_clip(self.vae, to_pixels(clips.pixels, self.device), self.config.vae).mean
        return mean if stored is None else merged(mean, stored, clips.encoded)

    def text(
        self, model: nn.ModuleDict, tokens: TextTokens | None, num_clips: int, stored: StoredText | None = None
    ) -> TextInputs:
        """Encode the captions, by the trained encoder or the frozen one; of this what is stored is taken."""
        assert tokens is not None
        tokens = tokens.to(self.device)
        features = model["text"](tokens) if self.frozen_text is None else self._frozen(self.frozen_text, tokens, stored)
        return row_text(features, num_clips, self.images_per_row)

    @torch.no_grad()
    def _frozen(self, encoder: TextEncoder, tokens: TextTokens, stored: StoredText | None) -> TextFeatures:
        if stored is None:
            features: TextFeatures = encoder(tokens)
            return features
        # In the dtype in which the encoder would have answered.
        known = stored.features.to(self.device, next(encoder.parameters()).dtype)
        new = [place for place in range(len(tokens.ids)) if place not in stored.places]
        made = encoder(tokens.rows(new)) if new else None
        return with_stored(made, known, stored.places, tokens)

    def quantiles(self, rows: list[int], purpose: str, step_rows: int) -> Tensor:
        """Where each row stands in the timestep density, (B,) fp64 in [0, 1).

        With `diffusion.stratified` each of the `step_rows` rows of a step has a stratum of its own, dealt anew each
        step; validation is always stratified.
        """
        c, seed = self.config, self.config.train.seed
        u = keys.uniform(seed, f"{purpose}/time", rows)
        if not c.diffusion.stratified and purpose == "train":
            return u
        slots, stride = step_rows, self.numbers_per_step
        if purpose != "train":
            slots = stride = max(1, self.num_validation)
        dealt = [deal(seed, purpose, row // stride, slots)[row % stride] for row in rows]
        return stratified_uniform(u, torch.tensor(dealt), slots)

    def self_condition(self, model: nn.ModuleDict, inputs: Inputs, video: Video, text: TextInputs) -> Tensor | None:
        """The estimate of a first pass, for a keyed share of the rows, without gradient (W.A.L.T.; 2208.04202)."""
        if inputs.chosen_B is None:
            return None
        if not inputs.estimated:
            return torch.zeros_like(video.x_t)
        with torch.no_grad():
            first = self.denoise(model, video.x_t, inputs.times, text, self.shown(inputs, video), None)
        return self.estimate(first, inputs, video)

    @torch.no_grad()
    def estimate(self, first: Tensor, inputs: Inputs, video: Video) -> Tensor:
        """x_hat of the output of a first pass, zeros for rows that are not chosen: what the second is given."""
        assert inputs.chosen_B is not None
        estimate = self.objective.denoised(first, video.x_t, inputs.t_B).to(self.dtype)
        if inputs.clean is not None:
            estimate = torch.where(inputs.clean[:, None, :, None, None], video.x_BCTHW, estimate)
        return estimate * inputs.chosen_B.to(self.device, estimate.dtype)[:, None, None, None, None]


def deal(seed: int, purpose: str, step: int, slots: int) -> list[int]:
    """A keyed permutation of the strata of one step."""
    return [int(slot) for slot in keys.generator(seed, f"{purpose}/strata", step).permutation(slots)]
