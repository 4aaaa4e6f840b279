"""What `train.task` decides: the model, the step function, and what needs the text or the frozen VAE."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from parallel.dtensor import fill
from parallel.exchange import from_first, num_ranks
from parallel.mesh import Mesh, build_mesh, ranks_per_node
from parallel.telemetry import Communication, count_communication
from parallel.zero import zero_micro_batch
from vidit.config import RunConfig
from vidit.model.flops import forward_flops, training_flops
from vidit.resolve import Grid, grid_of
from vidit.text.encoder import CaptionTokenizer, TextEncoder, build_text_encoder
from vidit.train.layout import layout_of, own_tokens, stages_of
from vidit.train.packed_step import PackedStep
from vidit.train.parallelize import build_discriminator, build_dit, build_vae, divide_vae
from vidit.train.passes import Passes, PlainPasses
from vidit.train.precision import choose_dtype
from vidit.train.rundir import keep_vae, newest_checkpoint
from vidit.train.step import DitStep, Step
from vidit.train.vae_step import VaeStep
from vidit.vae.autoencoder import Autoencoder
from vidit.vae.discriminator import JUDGE
from vidit.vae.inflate import starting_weights
from vidit.vae.perceptual import load_perceptual
from vidit.vae.store import load_vae
from vidit.vae.stored import with_vae


@dataclass
class Task:
    """A run's own part of the training loop. `forward_flops` is of one row on a grid, None where nobody has counted."""

    config: RunConfig
    model: nn.ModuleDict
    step: Step
    passes: Passes
    text: TextEncoder | None
    forward_flops: Callable[[Grid], int] | None
    mesh: Mesh | None = None

    @property
    def networks(self) -> list[list[nn.Parameter]]:
        """Trainable parameters that are clipped together: of the model, and of the discriminator where there is one."""
        groups: dict[bool, list[nn.Parameter]] = {False: []}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(name.startswith(JUDGE), []).append(parameter)
        return list(groups.values())

    @property
    def rows(self) -> Sequence[ProcessGroup | None]:
        """The groups that lead to the ranks with the other rows of a batch, as `exchange` takes them."""
        return self.mesh.rows if self.mesh else (None,)

    @property
    def pipeline(self) -> DeviceMesh | None:
        """The stages of which this rank has some; None where each rank has all."""
        return self.mesh.pipeline if self.mesh and self.mesh.layout.pipeline > 1 else None

    def rank_of(self, place: int) -> int:
        """The first rank with the rows of data rank `place`."""
        return place * self.mesh.layout.sequence * self.mesh.layout.tensor if self.mesh else 0

    def counted(self, into: Communication | None) -> AbstractContextManager[Communication | None]:
        """Counts what this rank sends inside; does nothing without a place to count."""
        if into is None or self.mesh is None:
            return nullcontext()
        return count_communication(self.mesh, into)

    @property
    def data_place(self) -> tuple[int, int]:
        """Which share of the rows is this rank's, and how many there are."""
        return (self.mesh.data_rank, self.mesh.layout.data) if self.mesh else (0, 1)

    @property
    def tokenizer(self) -> CaptionTokenizer | None:
        return self.text.tokenizer if self.text else None

    def work(self, size: tuple[int, int, int] | None) -> tuple[int, float]:
        """(tokens, FLOPs of a training step) of one row: of so many frames and pixels, or the run's own size."""
        c, d = self.config, self.config.data
        grid = grid_of(c, *(size or (d.num_frames, d.height, d.width)))
        flops = training_flops(self.forward_flops(grid), c.denoiser.self_conditioning) if self.forward_flops else 0.0
        return grid[0] * grid[1] * grid[2], flops


def build_task(config: RunConfig, device: torch.device, num_validation: int | None = None) -> Task:
    """Model and step of `train.task`, on the device, with initial weights."""
    dtype = choose_dtype(config.train.precision, device)
    mesh = None
    if num_ranks() > 1:
        ulysses = config.parallel.ulysses if config.parallel.sequence_kind == "ulysses_ring" else 0
        mesh = build_mesh(layout_of(config), device.type, ranks_per_node(), ulysses)
    if config.train.task == "vae":
        return vae_task(config, device, dtype, mesh)
    kept = from_first(lambda: str(keep_vae(config).vae.weights))
    config = with_vae(config, Path(kept))
    return dit_task(config, load_vae(Path(kept), device, dtype), device, dtype, mesh, num_validation)


def vae_task(config: RunConfig, device: torch.device, dtype: torch.dtype, mesh: Mesh | None = None) -> Task:
    """The autoencoder, and beside it the discriminator where the config has one."""
    t = config.vae_train
    perceptual = None
    if t.perceptual != "none":
        perceptual = load_perceptual(t.perceptual, t.perceptual_files).to(device)
        if dtype == torch.float64:
            perceptual.double()
    step = VaeStep(config, device, perceptual)
    parts = [build_vae(config, device, dtype, mesh)]
    own = parts[0].state_dict()
    # A run that goes on has its weights in a checkpoint, wherever it started from.
    if t.init and from_first(lambda: newest_checkpoint(config.directory) is None):
        for name, tensor in starting_weights(config.vae, Path(t.init), t.inflate).items():
            fill(own[f"vae.{name}"], tensor)
    if t.adversarial_weight:
        parts.append(build_discriminator(config, device, dtype, mesh))
    model = nn.ModuleDict({name: module for part in parts for name, module in part.items()})
    data_ranks = mesh.layout.data if mesh else 1
    passes = PlainPasses(model, step, lambda last: _around_each(parts, last), data_ranks)
    return Task(config, model, step, passes, None, None, mesh)


@contextmanager
def _around_each(parts: Sequence[nn.ModuleDict], last: bool) -> Iterator[None]:
    """Around a micro-batch of the autoencoder and of its discriminator, whose gradients are averaged when all of the
    former's are: two that send at once would have to agree on an order.
    """
    with ExitStack() as stack:
        for number, part in enumerate(parts):
            stack.enter_context(zero_micro_batch(part, last, overlap=not number))
        yield


def dit_task(
    config: RunConfig,
    vae: Autoencoder,
    device: torch.device,
    dtype: torch.dtype,
    mesh: Mesh | None = None,
    num_validation: int | None = None,
) -> Task:
    """The denoiser on latents of a VAE, which is there already."""
    divide_vae(vae, config, mesh)
    text = build_text_encoder(config.text, dtype, config.model.interleaves_text)
    model = build_dit(config, text, device, dtype, mesh)
    if not text.trainable:
        text.to(device)
    channels = config.vae.latent_channels

    def flops(grid: Grid) -> int:
        return forward_flops(config.denoiser, grid, channels, text.width, text.max_tokens, text.second_captions)

    kind = PackedStep if config.data.packed_tokens else DitStep
    step = kind(config, vae, text, device, num_validation)
    return Task(config, model, step, passes_of(config, model, step, mesh), text, flops, mesh)


def passes_of(config: RunConfig, model: nn.ModuleDict, step: Step, mesh: Mesh | None) -> Passes:
    """How a step of this layout is made."""
    p = config.parallel
    if mesh is None or p.pipeline == 1:
        data_ranks = mesh.layout.data if mesh else 1
        return PlainPasses(model, step, lambda last: zero_micro_batch(model, last), data_ranks)
    from vidit.train.pipeline import PipelinePasses  # a second to import, for what few runs need

    assert isinstance(step, DitStep)
    sequence_rank = mesh.sequence.get_local_rank()
    return PipelinePasses(
        model, step, stages_of(config), mesh.pipeline, p.schedule,
        lambda grid, layer: own_tokens(config, grid, layer, sequence_rank),
        lambda last: zero_micro_batch(model, last, overlap=False), timedelta(seconds=p.timeout_s),
    )  # fmt: skip
