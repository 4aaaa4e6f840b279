"""From a config to a model that is ready to train: the one place where model and layout meet.

The order is fixed: build on meta, cut the pipeline, divide by tensor and sequence, checkpoint activations, compile
blocks, divide by ZeRO, materialise, initialise. Without a mesh the model is whole.
"""

import torch
from torch import nn

from parallel.context import apply_context
from parallel.dtensor import fill
from parallel.mesh import Mesh
from parallel.sequence import apply_sequence
from parallel.sharded_norms import apply_sharded_norms
from parallel.stages import rank_of_stage
from parallel.tensor import apply_tensor
from parallel.zero import apply_zero
from vidit.config import RunConfig
from vidit.model.block import Block
from vidit.model.core import require_flash
from vidit.model.dit import DiT
from vidit.model.plan import sharding_plan
from vidit.model.single import SingleBlock
from vidit.model.stage import keep_stages, plan_of_stages
from vidit.model.unet.unet import UNITS, Cell, VideoUnet
from vidit.resolve import resolve
from vidit.text.encoder import TextEncoder
from vidit.train.frozen import freeze
from vidit.train.initial import initial_values
from vidit.train.layout import kind_of, stages_of
from vidit.train.recompute import recompute
from vidit.vae.autoencoder import Autoencoder, CausalVae
from vidit.vae.discriminator import JUDGE, Discriminator
from vidit.vae.layers import ResBlock
from vidit.vae.plan import context_plan


def build_dit(
    config: RunConfig, text: TextEncoder, device: torch.device, dtype: torch.dtype, mesh: Mesh | None = None
) -> nn.ModuleDict:
    """The denoiser, and beside it the text encoder where that is trained too: {"dit" or "unet", "text"}.

    With a mesh the config is one that `with_layout` has completed, and the denoiser this rank's part.
    """
    if (pooled := config.model.pooled_width) not in (0, text.pooled_width) and config.model.pooled_text:
        option, c = ("text.second", config.text.second) if config.text.has_second else ("text", config.text)
        raise ValueError(
            f"model.pooled_width={pooled}, but {option}.kind={c.kind} gives pooled captions of {text.pooled_width}; "
            f"use model.pooled_width=0, or an encoder of {pooled}"
        )
    task, channels, grid = config.train.task, config.vae.latent_channels, resolve(config).largest_grid
    require_flash(config.denoiser.attention_backend, device)
    with torch.device("meta"):
        if task == "unet":
            denoiser: DiT | VideoUnet = VideoUnet(config.unet, channels, grid, text.width)
        else:
            denoiser = DiT(config.model, channels, grid, text.width, text.second_captions[1])
    denoiser.dtype = dtype
    model = nn.ModuleDict({task: denoiser})
    if text.trainable:
        model["text"] = text
    freeze(model, config.train)
    names = list(model.state_dict())
    if mesh is not None and isinstance(denoiser, DiT):
        _divide(denoiser, config, mesh)
    units = UNITS if task == "unet" else (sharding_plan(config.model).blocks,)
    return _finish(model, config, device, dtype, mesh, [f"{task}.{unit}" for unit in units], names)


def build_vae(config: RunConfig, device: torch.device, dtype: torch.dtype, mesh: Mesh | None = None) -> nn.ModuleDict:
    """The autoencoder to be trained: {"vae"}."""
    with torch.device("meta"):
        vae = CausalVae(config.vae)
    vae.dtype = dtype
    vae.encoder.requires_grad_(not config.vae_train.freeze_encoder)
    model = nn.ModuleDict({"vae": vae})
    names = list(model.state_dict())
    divide_vae(vae, config, mesh)
    return _finish(model, config, device, dtype, mesh, ["vae.encoder", "vae.decoder"], names)


def build_discriminator(
    config: RunConfig, device: torch.device, dtype: torch.dtype, mesh: Mesh | None = None
) -> nn.ModuleDict:
    """What judges the autoencoder: {"discriminator"}. It is small, and whole on every rank."""
    with torch.device("meta"):
        judge = Discriminator(config.vae_train)
    judge.dtype = dtype
    whole = config.parallel.model_copy(update={"zero": 0, "cpu_offload": False})
    config, model = config.model_copy(update={"parallel": whole}), nn.ModuleDict({JUDGE.rstrip("."): judge})
    return _finish(model, config, device, dtype, mesh, [], list(model.state_dict()))


def divide_vae(vae: Autoencoder, config: RunConfig, mesh: Mesh | None) -> None:
    """Let the sequence ranks share the frames or rows of a VAE, trained or frozen, where the config asks for it."""
    over = config.parallel.vae_context
    if mesh is not None and over != "none":
        apply_context(vae, context_plan(config.vae), mesh.sequence, over)


def _divide(dit: DiT, config: RunConfig, mesh: Mesh) -> None:
    """Pipeline, then tensor, then sequence parallelism, as the plan of the model says."""
    layout, p, plan = mesh.layout, config.parallel, sharding_plan(config.model)
    if layout.pipeline > 1:
        ranks = rank_of_stage(p.schedule, layout.pipeline, p.stages_per_rank)
        own = mesh.pipeline.get_local_rank()
        keep_stages(dit, [layers for layers, rank in zip(stages_of(config), ranks, strict=True) if rank == own])
        plan = plan_of_stages(plan, dit)
    if layout.tensor > 1:
        apply_tensor(dit, plan.parameters, plan.regions, mesh.tensor, config.model.num_heads, plan.means)
    if layout.sequence > 1:
        apply_sequence(dit, plan, mesh, kind_of(config))
    if layout.tensor > 1 and p.sharded_norms is True:
        cut = {name: dims for name, dims in plan.split.items() if name not in plan.positions} | plan.placed
        apply_sharded_norms(
            dit,
            cut,
            plan.vectors,
            plan.regions,
            plan.gather,
            plan.counted,
            plan.before,
            mesh.tensor,
            layout.sequence,
            plan.beside,
        )


def _finish(
    model: nn.ModuleDict,
    config: RunConfig,
    device: torch.device,
    dtype: torch.dtype,
    mesh: Mesh | None,
    units: list[str],
    names: list[str],
) -> nn.ModuleDict:
    """What is done to any model: recompute, compile, ZeRO over `units`; then memory and values.

    `names` are of all its tensors, before it was cut.
    """
    c, p = config.train, config.parallel
    if dtype == torch.float64:
        model.double()
    for module in model.modules():
        if isinstance(module, Block | SingleBlock | Cell | ResBlock):
            if c.activation_checkpointing != "none":
                recompute(module, c.activation_checkpointing)
            if c.compile:
                module.compile()
    if mesh is not None and mesh.zero.size() > 1:
        apply_zero(
            model, units, mesh.zero, level=p.zero, cpu_offload=p.cpu_offload, methods=("encode", "decode"),
            reduce_dtype=torch.bfloat16 if p.reduce_dtype == "bf16" else None,
        )  # fmt: skip
    model.to_empty(device="cpu" if p.cpu_offload else device)
    value = initial_values(config, names)
    for name, parameter in model.named_parameters():
        fill(parameter, value(name, tuple(parameter.shape)))
    for module in model.modules():
        if isinstance(module, CausalVae):
            module.latent_mean.zero_()
            module.latent_std.fill_(1)
        if isinstance(module, Discriminator):
            module.averages.zero_()
    return model
