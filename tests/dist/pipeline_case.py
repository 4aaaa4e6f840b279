"""A training step of the real DiT in fp64, through a pipeline and in one process: all that the two must share."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from dit_case import wholes
from torch import Tensor, nn

from parallel import pipeline as pipeline_module
from parallel.dtensor import fill
from parallel.gradients import gradient_norm
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.sequence import apply_sequence
from parallel.tensor import apply_tensor
from parallel.zero import apply_zero, zero_micro_batch
from vidit import keys
from vidit.config import RunConfig, Text, Vae
from vidit.data.loader import Batch
from vidit.data.rows import Clips
from vidit.model.dit import DiT
from vidit.model.init import initialise
from vidit.model.plan import sharding_plan
from vidit.model.stage import keep_stages, plan_of_stages
from vidit.resolve import resolve
from vidit.sample.draw import draw
from vidit.text.encoder import CaptionTokenizer, TextEncoder, TextFeatures, TextTokens, build_text_encoder
from vidit.text.pair import PairTextEncoder
from vidit.train import pipeline as train_pipeline
from vidit.train.ema import Ema
from vidit.train.layout import own_tokens, stages_of
from vidit.train.passes import Passes, PlainPasses
from vidit.train.pipeline import PipelinePasses, own_stages
from vidit.train.recompute import recompute
from vidit.train.step import DitStep, Inputs, Losses, Video
from vidit.vae.autoencoder import CausalVae

VAE = {
    "latent_channels": 4, "patch": 2, "base_channels": 8, "multipliers": (1, 2), "num_res_blocks": (0, 1),
    "decoder_res_blocks": (0, 1), "spatial_down": (True,), "temporal_down": (True,),
}  # fmt: skip
MODEL: dict[str, Any] = {
    "num_layers": 5, "width": 32, "num_heads": 4, "mlp_width": 48, "windows": ((1, 0, 0), (0, 2, 2)), "patch": 1,
    "pooled_text": True, "frame_rate": True, "self_conditioning": 0.6, "attention_backend": "sdpa",
}  # fmt: skip
TEXT: dict[str, Any] = {"width": 16, "num_layers": 1, "num_heads": 2, "max_tokens": 5, "hash_buckets": 64}
PAIR: dict[str, Any] = {
    "kind": "t5", "path": "unread", "max_tokens": 5, "second": {"kind": "clip", "path": "unread", "max_tokens": 4},
}  # fmt: skip
ROWS, SEED = 3, 3


@dataclass(frozen=True)
class Case:
    """One model, one layout, one schedule. 45 tokens, which neither 2 nor 4 ranks divide."""

    layout: dict[str, int] = field(default_factory=dict)
    schedule: Any = "1f1b"
    stages_per_rank: int = 1
    micro_batches: int = 4
    model: dict[str, Any] = field(default_factory=dict)
    given: tuple[dict[str, Any], ...] = ()
    images: bool = True
    trained_text: bool = True
    checkpoint: bool = False
    zero: Any = 3
    kind: Any = "ulysses"
    stages: tuple[range, ...] = ()
    plant: str = ""

    @property
    def config(self) -> RunConfig:
        layout = {"pipeline": 1, "shard": 1, **self.layout}
        pipeline = {"schedule": self.schedule, "stages_per_rank": self.stages_per_rank} if self.layout else {}
        sequence = {"sequence_kind": self.kind} if "sequence" in self.layout else {}
        return RunConfig.model_validate(
            {
                "name": "pipe", "vae": {"weights": "unread", **VAE}, "model": {**MODEL, **self.model},
                "text": PAIR if self.model.get("cross_text") == "interleaved" else TEXT,
                "data": {"train": "unread", "num_frames": 5, "height": 20, "width": 12, "image_rows": int(self.images)},
                "train": {"global_batch": ROWS * self.micro_batches, "micro_batch": ROWS, "seed": SEED},
                "parallel": {**layout, **pipeline, **sequence},
                "sample": {"num_steps": 2, "guidance": 2.0},
                "diffusion": {"given": self.given},
            }
        )  # fmt: skip


class FrozenText(TextEncoder):
    """Features from a fixed table."""

    trainable = False

    def __init__(self, text: TextEncoder):
        super().__init__()
        self.width, self.max_tokens = text.width, text.max_tokens
        self.tokenizer = text.tokenizer
        self.table = nn.Parameter(value("frozen", (64, text.width)), requires_grad=False)

    def forward(self, tokens: TextTokens) -> TextFeatures:
        features = self.table[tokens.ids[:, :, 0] % 64] * tokens.mask_BL.unsqueeze(-1)
        return TextFeatures(features, tokens.mask_BL, features.mean(1))


class OtherText(FrozenText):
    """Another one, with another width and fewer tokens of other words."""

    def __init__(self, text: TextEncoder):
        super().__init__(text)
        self.width, self.max_tokens = text.width - 4, text.max_tokens - 1
        self.tokenizer = OtherTokens(text.tokenizer, self.max_tokens)
        self.table = nn.Parameter(value("other", (64, self.width)), requires_grad=False)


@dataclass(frozen=True)
class OtherTokens:
    """The first tokens, with other numbers."""

    tokenizer: CaptionTokenizer
    max_tokens: int

    def __call__(self, captions: Sequence[str]) -> TextTokens:
        tokens = self.tokenizer(captions)
        return TextTokens(tokens.ids[:, : self.max_tokens] // 3, tokens.mask_BL[:, : self.max_tokens])


class WideStep(DitStep):
    """Times, frame rates and latents in fp64, so that no fp32 island hides an error."""

    def inputs(self, batch: Batch, purpose: str) -> Inputs:
        own = super().inputs(batch, purpose)
        return replace(own, t_B=own.t_B.double())

    def frame_rates(self, fps: Sequence[float]) -> Tensor | None:
        rates_B = super().frame_rates(fps)
        return None if rates_B is None else rates_B.double()

    def video(self, batch: Batch, inputs: Inputs) -> Video:
        own = super().video(batch, inputs)
        x, noise = own.x_BCTHW.double(), own.noise.double()
        return Video(x, noise, self.objective.path.add_noise(x, noise, inputs.t_B))


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    """A full parameter, fp64; no path is closed by a zero."""
    noise = torch.from_numpy(keys.generator(1, "value", name).standard_normal(shape, np.float64))
    full = 1 + 0.2 * noise if "norm" in name and "weight" in name else noise / max(3, shape[-1]) ** 0.5
    return full.float().double()  # an average is kept in fp32, and exchanging it must change nothing


def batch(case: Case, number: int, rows: int = ROWS) -> Batch:
    """Micro-batch `number` of the step, or of a validation with other rows; the last row images, if there are any."""
    frames, height, width = resolve(case.config).grid
    g = torch.Generator().manual_seed(number)
    clips = rows - int(case.images)

    def latents(n: int, frames: int) -> Clips:
        x = torch.randn(n, VAE["latent_channels"], frames, height, width, generator=g)
        return Clips([f"{number}/{i}" for i in range(n)], latents=x, fps=tuple(8.0 + 3 * i for i in range(n)))

    pictures = latents(frames, 1) if case.images else None
    captions = [f"caption {number} of {i} words"[: 9 + 4 * i] for i in range(clips + (frames if case.images else 0))]
    numbers = list(range(number * rows, (number + 1) * rows))
    # Without a shard of the data every round is one micro-batch.
    step_rows = case.config.train.global_batch
    return Batch(numbers, latents(clips, frames), pictures, tokenizer(case)(captions), numbers, step_rows)


def tokenizer(case: Case) -> Any:
    return encoder(case).tokenizer


def encoder(case: Case) -> TextEncoder:
    text = build_text_encoder(Text(**TEXT)).double()
    text.dtype = torch.float64
    if case.trained_text:
        return text
    two = case.config.model.cross_text == "interleaved"
    return PairTextEncoder(FrozenText(text), OtherText(text), True) if two else FrozenText(text)


def on_meta(case: Case) -> DiT:
    c, text = case.config, encoder(case)
    with torch.device("meta"):
        size = c.vae.latent_channels, resolve(c).grid
        model = DiT(c.model, *size, text.width, text.second_captions[1]).double()
    model.dtype = torch.float64
    return model


def stepper(case: Case, text: TextEncoder) -> WideStep:
    vae = CausalVae(Vae(**VAE))
    initialise(vae, seed=1)
    vae.latent_mean.copy_(torch.linspace(-0.2, 0.2, 4))
    vae.latent_std.copy_(torch.linspace(0.5, 0.9, 4))
    return WideStep(case.config, vae, text, torch.device("cpu"), num_validation=8)


def filled(model: nn.ModuleDict) -> nn.ModuleDict:
    model.to_empty(device="cpu")
    for name, p in model.named_parameters():
        fill(p, value(name, tuple(p.shape)))
    return model


@dataclass
class Result:
    """Row losses of each micro-batch by its number, gradients by name, their norm, names of the state dict.

    `validation` and `sample` are row losses and a video (T, H, W, 3) of averaged weights.
    """

    losses: dict[int, Tensor]
    grads: dict[str, Tensor]
    norm: float
    validation: Tensor
    sample: Tensor
    names: list[str]


def measure(
    case: Case, passes: Passes, step: DitStep, model: nn.ModuleDict, text: TextEncoder, batches: list[Batch], mesh: Any
) -> Result:
    """Two steps' worth of passes, of which the second counts: what a schedule keeps must not leak into it."""
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        losses: list[Losses] = passes.forward_backward(batches)
    norm = gradient_norm(model.parameters(), mesh, passes.shared) if mesh else gradient_norm(model.parameters())
    grads = wholes({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    ema = Ema(model, 0.9)
    for average in ema.averages.values():
        average.mul_(1.25)
    with ema.applied(model), torch.no_grad():
        validation = step(passes.evaluated, batch(case, 1, rows=2), "validation").rows_B
        (sample,) = draw(case.config, step, passes.evaluated, text, ["a red circle"], seed=4)
    again = passes.forward_backward(batches)
    assert all(torch.equal(a.rows_B, b.rows_B) for a, b in zip(losses, again, strict=True)), "after a validation"
    by_number = {own.rows[0] // ROWS: found.rows_B for own, found in zip(batches, losses, strict=True)}
    return Result(by_number, grads, float(norm), validation, sample, list(model.state_dict()))


def single(case: Case) -> Result:
    text = encoder(case)
    model = filled(nn.ModuleDict({"dit": on_meta(case), **({"text": text} if text.trainable else {})}))
    step = stepper(case, text)
    batches = [batch(case, number) for number in range(case.micro_batches)]
    return measure(case, PlainPasses(model, step), step, model, text, batches, None)


def on_ranks(case: Case) -> Result:
    with planted(case.plant):
        layout, c = Layout(**case.layout), case.config
        mesh, text, dit = build_mesh(layout, "cpu"), encoder(case), on_meta(case)
        stages = list(case.stages) or stages_of(c)
        own = own_stages(len(stages), case.schedule, mesh.pipeline)
        keep_stages(dit, [stages[number] for number in own])
        plan = plan_of_stages(sharding_plan(c.model), dit)
        if layout.tensor > 1:
            apply_tensor(dit, plan.parameters, plan.regions, mesh.tensor, c.model.num_heads, plan.means)
        if layout.sequence > 1:
            apply_sequence(dit, plan, mesh, case.kind)
        for block in dit.blocks.values():
            if case.checkpoint:
                recompute(block)
        model = nn.ModuleDict({"dit": dit, **({"text": text} if text.trainable else {})})
        if mesh.zero.size() > 1:
            apply_zero(model, [f"dit.{plan.blocks}"], mesh.zero, level=case.zero)
        filled(model)
        step = stepper(case, text)

        def held(grid: tuple[int, int, int], layer: int) -> int:
            return own_tokens(c, grid, layer, mesh.sequence.get_local_rank())

        def around(last: bool) -> Any:
            return zero_micro_batch(model, last, overlap=False)

        passes = PipelinePasses(model, step, stages, mesh.pipeline, case.schedule, held, around)
        own_num = case.micro_batches // layout.data
        numbers = range(mesh.data_rank * own_num, (mesh.data_rank + 1) * own_num)
        batches = [batch(case, number) for number in numbers]
        return measure(case, passes, step, model, text, batches, mesh.pipeline)


def errors(reference: Result, results: list[Result]) -> dict[str, float]:
    """Largest relative errors over all ranks. Gradients below 1e-6 of the largest count as that."""
    worst = dict.fromkeys(("loss", "gradient", "norm", "validation", "sample", "replica"), 0.0)
    floor = 1e-6 * max(float(g.norm()) for g in reference.grads.values())
    seen: dict[str, Tensor] = {}
    for r in results:
        for number, found in r.losses.items():
            worst["loss"] = max(worst["loss"], relative(found, reference.losses[number]))
        worst["validation"] = max(worst["validation"], relative(r.validation, reference.validation))
        difference = (r.sample.int() - reference.sample.int()).abs().max()
        worst["sample"] = max(worst["sample"], float(difference))
        worst["norm"] = max(worst["norm"], abs(r.norm / reference.norm - 1))
        for name, g in r.grads.items():
            expected = reference.grads[name]
            worst["gradient"] = max(
                worst["gradient"], float((g - expected).norm()) / max(floor, float(expected.norm()))
            )
            if name in seen:
                worst["replica"] = max(worst["replica"], float((g - seen[name]).abs().max()))
            seen[name] = g
    assert seen.keys() == reference.grads.keys(), seen.keys() ^ reference.grads.keys()
    return worst


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _unsummed(shared: Any, mesh: Any) -> None:
    pass


def _undivided(passes: PipelinePasses, batches: list[Batch]) -> list[Losses]:
    """The loss is not divided by the number of micro-batches."""
    forward_backward = pipeline_module.Pipeline.forward_backward

    def louder(self: Any, inputs: Any, micro: Any, shapes: Any, loss: Any) -> None:
        forward_backward(self, inputs, micro, shapes, lambda out, number: loss(out, number) * len(micro))

    with patch.object(pipeline_module.Pipeline, "forward_backward", louder):
        return right_passes(passes, batches)


def _counted_twice(parameters: Any, pipeline: Any = None, shared: Any = ()) -> Tensor:
    return right_norm(parameters, pipeline)


def _never(pipeline: Any, *rest: Any) -> list[Tensor]:
    return [out * 0 for out in right_forward(pipeline, *rest)]


def _forgetful(weights: Any) -> Any:
    """The first product of every other backward pass gets no weight gradient."""
    weights.calls = getattr(weights, "calls", 0) + 1
    if weights.calls % 2:
        del weights.waiting[0]
    return right_take(weights)


right_passes, right_norm = PipelinePasses.forward_backward, gradient_norm
right_forward = pipeline_module.Pipeline.forward
right_take = train_pipeline.WeightGradients.take
PLANTS: dict[str, tuple[Any, str, Any]] = {
    "shared gradient not summed": (train_pipeline, "sum_shared", _unsummed),
    "loss not divided by micro-batches": (PipelinePasses, "forward_backward", _undivided),
    "shared counted twice in the norm": (sys.modules[__name__], "gradient_norm", _counted_twice),
    "estimate does not arrive": (pipeline_module.Pipeline, "forward", _never),
    "weight gradients forgotten": (train_pipeline.WeightGradients, "take", _forgetful),
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    with ExitStack() as stack:
        if name:
            owner, attribute, bug = PLANTS[name]
            stack.enter_context(patch.object(owner, attribute, bug))
        yield
