"""The layout of a run, and whether it fits the model, the machine and the batch: every fault, before anything starts.

Arithmetic only, no torch and no process group, so that the command line can refuse a run before it starts ranks.
"""

from collections.abc import Iterator
from importlib.metadata import version

from parallel.dealing import rank_tokens
from parallel.kinds import SequenceKind, choose_kind, sequence_faults, ulysses_degree
from parallel.layout import Layout
from parallel.parts import context_faults, row_faults
from parallel.stages import cut, micro_batch_faults, stage_faults
from vidit.config import AnyWindow, Bucket, Launch, RunConfig, Window, refuse
from vidit.model.flops import block_flops, embed_flops, head_flops, window_of
from vidit.resolve import faults, grid_of, latent_frames, resolve
from vidit.text.width import captions_of


def layout_of(config: RunConfig) -> Layout:
    """Degrees of the five axes of a config that `with_layout` has completed."""
    p = config.parallel
    return Layout(p.pipeline, p.replicate, p.shard, p.sequence, p.tensor)


def with_layout(config: RunConfig, num_ranks: int, ranks_per_node: int | None = None) -> RunConfig:
    """The config with every `auto` and every 0 of its layout written out, for `num_ranks` ranks.

    Raises ConfigError with every fault of the run and of its layout.
    """
    if config.launch.local not in (1, num_ranks):  # of one node of several: the layout is what tells of all ranks
        config = config.model_copy(update={"launch": Launch()})
    found = list(faults(config, num_ranks))
    refuse([*found, *_whatever_the_ranks(config)] if found else [])
    changes: dict[str, object] = {"shard": resolve(config, num_ranks).shard}
    fixed = config.model_copy(update={"parallel": config.parallel.model_copy(update=changes)})
    layout, p, m = layout_of(fixed), fixed.parallel, fixed.model
    has_tokens = config.train.task == "dit" and layout.sequence > 1
    if p.sequence_kind == "auto" and has_tokens and m.num_heads % layout.tensor == 0:
        windows = [] if p.sharded_norms is True or m.temporal_attention else _windows(fixed)
        chosen = choose_kind(layout, m.num_heads, windows, _grids(fixed), ranks_per_node)
        changes["sequence_kind"] = "ulysses" if config.data.packed_tokens else chosen
    kind = changes.get("sequence_kind", p.sequence_kind)
    if kind == "ulysses_ring" and not p.ulysses:
        changes["ulysses"] = ulysses_degree(layout, m.num_heads, ranks_per_node)
    if p.sharded_norms == "auto" and config.train.task == "dit" and layout.tensor > 1:
        whole = m.is_joint or config.data.packed_tokens > 0
        changes["sharded_norms"] = not (whole or (layout.sequence > 1 and kind == "window"))
    fixed = config.model_copy(update={"parallel": config.parallel.model_copy(update=changes)})
    refuse([*layout_faults(fixed, ranks_per_node)])
    return fixed


def kind_of(config: RunConfig) -> SequenceKind:
    """The kind of sequence parallelism of a config that `with_layout` has completed."""
    kind = config.parallel.sequence_kind
    assert kind != "auto", "auto is written out by with_layout"
    return kind


def stages_of(config: RunConfig) -> list[range]:
    """The layers of every stage of the pipeline, cut by forward FLOPs."""
    c, r, p = config.model, resolve(config), config.parallel
    channels, text = config.vae.latent_channels, captions_of(config)
    costs = [block_flops(c, layer, r.grid, (text.tokens, text.width), text.second) for layer in range(c.num_layers)]
    ends = embed_flops(c, r.grid, channels), head_flops(c, r.grid, channels)
    return cut(costs, p.pipeline * p.stages_per_rank, *ends)


def own_tokens(config: RunConfig, grid: Window, layer: int, sequence_rank: int) -> int:
    """How many tokens of a row a rank holds behind a block."""
    p, tokens = config.parallel, grid[0] * grid[1] * grid[2]
    if p.sequence > 1 and p.sequence_kind == "window":
        return rank_tokens(window_of(config.model, layer), grid, p.sequence)[sequence_rank]
    for ranks in (p.sequence, p.tensor if p.sharded_norms is True else 1):
        tokens = -(-tokens // ranks)
    return tokens


def _windows(config: RunConfig) -> list[AnyWindow]:
    return [window_of(config.model, layer) for layer in range(config.model.num_layers)]


def _shapes(config: RunConfig) -> list[Bucket]:
    """Of training, and of validation and samples."""
    d = config.data
    return [*d.shapes, Bucket(num_frames=d.num_frames, height=d.height, width=d.width)]


def _grids(config: RunConfig) -> list[Window]:
    return list(dict.fromkeys(grid_of(config, s.num_frames, s.height, s.width) for s in _shapes(config)))


def _context_faults(config: RunConfig) -> Iterator[str]:
    p = config.parallel
    if p.vae_context == "time":
        for frames in dict.fromkeys(latent_frames(config, shape.num_frames) for shape in _shapes(config)):
            yield from context_faults(frames, p.sequence)
    elif p.vae_context == "rows":
        for rows in dict.fromkeys(shape.height // config.vae.spatial_stride for shape in _shapes(config)):
            yield from row_faults(rows, p.sequence)


def layout_faults(config: RunConfig, ranks_per_node: int | None = None) -> Iterator[str]:
    """What keeps the model and the batch of a config from being divided as its layout says."""
    layout, p = layout_of(config), config.parallel
    yield from layout.faults(layout.world, ranks_per_node)
    yield from _whatever_the_ranks(config)
    if config.train.task == "vae":
        yield from _context_faults(config)
    elif config.train.task == "dit":
        yield from _sequence_faults(config, layout, ranks_per_node)
        yield from _micro_batch_faults(config)
        if p.vae_context != "none" and config.data.cache_latents:
            yield (
                f"parallel.vae_context={p.vae_context} divides one clip, but with data.cache_latents=true every rank "
                "encodes clips of its own; leave one out"
            )
        else:
            yield from _context_faults(config)
    if layout.data * layout.sequence == 1:
        if p.cpu_offload:
            yield "parallel.cpu_offload=true has no effect: no rank shares its parameters; leave it out"
        if p.reduce_dtype != "fp32":
            yield f"parallel.reduce_dtype={p.reduce_dtype} has no effect: ranks sum no gradient; leave it out"
        if p.zero != 3:
            yield f"parallel.zero={p.zero} has no effect: no ranks share parameters; leave it out"
    elif layout.shard * layout.sequence == 1 and p.zero in (1, 2):
        yield (
            f"parallel.zero={p.zero} divides nothing: replicate={layout.replicate} keeps whole copies and shard x "
            "sequence is 1; use zero=0, or parallel.shard instead of replicate"
        )
    if p.reduce_dtype == "bf16" and config.train.precision == "fp64":
        yield "parallel.reduce_dtype=bf16 rounds the gradients that train.precision=fp64 is to prove; leave it out"
    if layout.world == 1:
        for name, default in (("count_communication", False), ("timeout_s", 600.0)):
            if getattr(p, name) != default:
                yield f"parallel.{name}={getattr(p, name)} has no effect: 1 rank waits for none; leave it out"
    if p.zero == 0 and p.cpu_offload:
        yield "parallel.cpu_offload=true has no effect with parallel.zero=0, which divides nothing; use zero=1, 2 or 3"
    if p.cpu_offload and config.train.device == "cpu":
        yield "parallel.cpu_offload=true has no effect on train.device=cpu, whose memory holds everything; leave it out"


def _whatever_the_ranks(config: RunConfig) -> Iterator[str]:
    """What is wrong with degrees however many ranks there are."""
    if config.train.task == "vae":
        yield from _vae_faults(config)
        return
    if config.train.task == "unet":
        yield from _unet_faults(config)
        return
    p, m = config.parallel, config.model
    yield from Layout(tensor=p.tensor).head_faults(m.num_heads)
    yield from Layout(tensor=p.tensor).width_faults("model.mlp_width", m.mlp_width)
    yield from stage_faults(m.num_layers, p.schedule, p.pipeline, p.stages_per_rank)
    if m.is_joint and p.sharded_norms is True:
        yield (
            "parallel.sharded_norms=true cuts the video's tokens and not the text's beside them (model.cross_attention="
            "joint); leave it out"
        )
    if config.data.packed_tokens and p.sharded_norms is True:
        yield (
            "parallel.sharded_norms=true cuts tokens between the modules that know which clip they are of (data."
            f"packed_tokens={config.data.packed_tokens}); leave it out"
        )
    yield from _torch_faults(config)


def _torch_faults(config: RunConfig) -> Iterator[str]:
    c = config.train
    major, minor = (int(part) for part in version("torch").split(".")[:2])
    if config.parallel.tensor > 1 and c.compile and c.activation_checkpointing != "none" and (major, minor) < (2, 14):
        yield (
            f"parallel.tensor={config.parallel.tensor} with train.compile=true and train.activation_checkpointing="
            f"{c.activation_checkpointing} does not run on torch {major}.{minor}, only from 2.14 on; each two of the "
            "three do: leave one out"
        )


def _sequence_faults(config: RunConfig, layout: Layout, ranks_per_node: int | None) -> Iterator[str]:
    p, m = config.parallel, config.model
    if layout.sequence == 1 or m.num_heads % layout.tensor:
        return
    kind = kind_of(config)
    if config.data.packed_tokens and kind != "ulysses":
        yield (
            f"parallel.sequence_kind={kind} divides the tokens of one clip, not of several side by side (data."
            f"packed_tokens={config.data.packed_tokens}); use ulysses"
        )
        return
    yield from sequence_faults(kind, layout, m.num_heads, _windows(config), _grids(config), p.ulysses, ranks_per_node)
    if kind in ("ring", "ulysses_ring") and m.attention_backend == "flash":
        yield (
            f"parallel.sequence_kind={kind} has kernels of its own, so model.attention_backend=flash has no effect; "
            "use auto"
        )
    if kind == "window" and m.temporal_attention:
        yield (
            "model.temporal_attention=true mixes tokens of a block in windows of two kinds, of which parallel."
            "sequence_kind=window can keep one whole on a rank; use ulysses, ring or ulysses_ring"
        )
    if kind == "window" and p.sharded_norms is True:
        yield (
            "parallel.sharded_norms=true needs equally many tokens on every rank, which parallel.sequence_kind=window "
            "does not give: it deals whole windows; use ulysses, ring or ulysses_ring"
        )


def _micro_batch_faults(config: RunConfig) -> Iterator[str]:
    p, r = config.parallel, resolve(config)
    if p.pipeline > 1:
        rows = config.train.micro_batch * r.data_ranks
        yield from micro_batch_faults(p.schedule, p.pipeline, p.stages_per_rank, r.accumulation, rows)


def _vae_faults(config: RunConfig) -> Iterator[str]:
    """A VAE has rows and frames to divide, and no heads, tokens or blocks."""
    p = config.parallel
    for name in ("pipeline", "tensor"):
        if getattr(p, name) > 1:
            yield f"parallel.{name}={getattr(p, name)} does not apply to train.task=vae; use shard or replicate"
    if p.sequence > 1 and p.vae_context == "none":
        yield (
            f"parallel.sequence={p.sequence} divides nothing of a VAE without parallel.vae_context=time or rows; set "
            "that, or use parallel.shard"
        )


def _unet_faults(config: RunConfig) -> Iterator[str]:
    """A U-Net is a baseline: its ranks divide rows and state, and nothing else."""
    for name in ("pipeline", "tensor", "sequence"):
        if (degree := getattr(config.parallel, name)) > 1:
            yield (
                f"parallel.{name}={degree} does not apply to train.task=unet, which takes data parallelism and ZeRO; "
                "use shard or replicate"
            )
