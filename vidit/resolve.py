"""A run checked as a whole, and the numbers that follow from it.

`resolve` is pure: it lists every fault at once and computes every derived number (latent grid, tokens,
accumulation) before any device is touched. It reads no file; the geometry of a VAE on disk is put into the
config first (`vidit/vae/stored.py`). No torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from vidit.config import AnyWindow, RunConfig, refuse, whole_window
from vidit.data.selection import rule_faults
from vidit.idle import idle_faults

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Resolved:
    """Numbers that follow from a config and a world size. Sizes are in tokens unless named otherwise.

    `grid` is of validation and samples, and of training unless there are buckets; `largest_grid` covers those too.
    `data_ranks` is how many ways the rows of a batch are divided, `shard` the degree of that axis.
    """

    latent_frames: int
    latent_height: int
    latent_width: int
    grid: Grid
    largest_grid: Grid
    tokens_per_clip: int
    windows: tuple[AnyWindow, ...]
    head_dim: int
    num_ranks: int
    data_ranks: int
    shard: int
    accumulation: int
    clips_total: int


def grid_of(config: RunConfig, num_frames: int, height: int, width: int) -> Grid:
    """Latent frames and tokens of a clip of that many frames and pixels."""
    (pt, ph, pw), stride = config.denoiser.patch, config.vae.spatial_stride
    return latent_frames(config, num_frames) // pt, height // (stride * ph), width // (stride * pw)


def latent_frames(config: RunConfig, num_frames: int) -> int:
    """Of a clip of that many frames."""
    return 1 + (num_frames - 1) // config.vae.temporal_stride


def ranks_of(config: RunConfig) -> int:
    """How many ranks a config is made for: what it launches, or what its layout says where that is left to others."""
    p, local = config.parallel, config.launch.local
    return p.ranks_per_row * p.replicate * p.shard if local == 1 and p.shard else local


def resolve(config: RunConfig, world_size: int | None = None) -> Resolved:
    """Check a config as a whole and derive its numbers, for `world_size` ranks or those it is made for.

    Raises ConfigError with every fault. Whether a layout fits its model is checked by `vidit/train/layout.py`.
    """
    refuse(faults(config, world_size))
    world_size = world_size or ranks_of(config)
    data_ranks = world_size // config.parallel.ranks_per_row
    c, data, vae = config, config.data, config.vae
    grid = grid_of(c, data.num_frames, data.height, data.width)
    grids = [grid, *(grid_of(c, shape.num_frames, shape.height, shape.width) for shape in data.shapes)]
    return Resolved(
        latent_frames=latent_frames(c, data.num_frames),
        latent_height=data.height // vae.spatial_stride,
        latent_width=data.width // vae.spatial_stride,
        grid=grid,
        largest_grid=(max(g[0] for g in grids), max(g[1] for g in grids), max(g[2] for g in grids)),
        tokens_per_clip=grid[0] * grid[1] * grid[2],
        windows=tuple(whole_window(window, grid) for window in c.model.windows),
        head_dim=c.model.width // c.model.num_heads,
        num_ranks=world_size,
        data_ranks=data_ranks,
        shard=data_ranks // config.parallel.replicate,
        accumulation=c.train.global_batch // (c.train.micro_batch * data_ranks),
        clips_total=c.train.steps * c.train.global_batch,
    )


def faults(config: RunConfig, world_size: int | None = None, geometry_known: bool = True) -> Iterator[str]:
    """All that is wrong with a config, one line each.

    Without `geometry_known` the `vae` section stands for a folder that could not be read, and what follows
    from its strides is left out.
    """
    c = config
    if c.train.task != "vae":
        yield from c.text.faults()
        yield from c.denoiser.faults()
        yield from c.diffusion.faults()
    if geometry_known:
        yield from c.vae.faults()
        if c.vae.sees_whole_frames and c.parallel.vae_context == "rows":
            why = {
                "vae.norm=group takes its statistics": ("vae.norm=rms", c.vae.norm == "group"),
                "vae.mid_attention=true attends": ("vae.mid_attention=false", c.vae.mid_attention),
            }
            told = [does for does, (_, is_so) in why.items() if is_so]
            cures = [cure for cure, is_so in why.values() if is_so]
            yield (
                f"parallel.vae_context=rows divides frames, over each of which {' and '.join(told)}; use "
                f"parallel.vae_context=time, or {' and '.join(cures)}"
            )
        yield from _size_faults(c)
        if not c.vae.first_frame_alone and c.data.image_rows and c.data.cache_latents:
            yield (
                f"data.image_rows={c.data.image_rows} with data.cache_latents=true takes a clip's first latent frame "
                f"for an image, and that of {c.vae.kind} has seen other frames; leave one out"
            )
    yield from c.train.faults()
    if c.train.task == "vae":
        yield from _recipe_faults(c)
    ranks = world_size or ranks_of(c)
    yield from _rank_faults(c, ranks)
    yield from _batch_faults(c, max(1, ranks // c.parallel.ranks_per_row))
    yield from _input_faults(c)
    yield from _bucket_faults(c)
    if c.data.packed_tokens and c.train.task == "dit":
        yield from _packed_faults(c, geometry_known)
    yield from _stream_faults(c)
    yield from (f"data.select: {fault}" for fault in rule_faults(c.data.select))
    for number, source in enumerate(c.data.mixture):
        yield from (f"data.mixture.{number}.select: {fault}" for fault in rule_faults(source.select))
    if c.train.task != "vae":
        yield from _caption_faults(c)
        if c.model.is_joint and c.model.relative_position == "rope" and c.data.image_rows:
            yield (
                f"data.image_rows={c.data.image_rows} puts images at times that rotation shows to the text beside them "
                "(model.cross_attention=joint, relative_position=rope); use a bucket of num_frames=1 instead"
            )
        yield from _skip_faults(c)
        if c.model.frame_times and c.diffusion.given and c.diffusion.path != "flow":
            yield (
                f"model.frame_times=true shows given frames clean at time 0, which path {c.diffusion.path} does not "
                "condition on; use diffusion.path=flow, or model.given_channels=true"
            )
        if c.model.patch[0] > 1 and c.data.image_rows:
            yield (
                f"model.patch={list(c.model.patch)} puts latent frames together, but of data.image_rows="
                f"{c.data.image_rows} each frame is an image; use a patch of one frame, or no image rows"
            )
        if c.model.text_padding == "seen" and c.data.image_rows:
            yield (
                f"model.text_padding=seen does not go with data.image_rows={c.data.image_rows}: a row of images holds "
                "their captions side by side, each for its own; use text_padding=masked, or a bucket of num_frames=1"
            )
        if c.train.task == "unet" and c.train.optimizer == "muon":
            yield "train.optimizer=muon is for the matrices of transformer blocks; use adamw with train.task=unet"
        d = c.diffusion
        if d.path == "vp" and c.sample.num_steps > d.num_train_steps:
            yield (
                f"sample.num_steps={c.sample.num_steps} exceeds diffusion.num_train_steps={d.num_train_steps}: a time "
                f"would repeat; use at most {d.num_train_steps}"
            )
    yield from idle_faults(c)


def _skip_faults(c: RunConfig) -> Iterator[str]:
    """Groups of k tokens begin anew in a clip, not in each image of a row."""
    groups = [
        w for w in (c.model.window(layer) for layer in range(c.model.num_layers)) if len(w) == 2 and w[0] == "group"
    ]
    _, height, width = grid_of(c, c.data.num_frames, c.data.height, c.data.width)
    for k in dict.fromkeys(k for _, k in groups if height * width % k and c.data.image_rows):
        yield (
            f"model.windows=(group, {k}) counts tokens in groups of {k}, and an image of data.image_rows="
            f"{c.data.image_rows} has {height * width}: its groups would depend on its place in the row; use a size "
            f"with a multiple of {k} tokens, or a bucket of num_frames=1"
        )


def _size_faults(c: RunConfig) -> Iterator[str]:
    """What the strides of the VAE and the patch do not divide."""
    pt, ph, pw = c.model.patch if c.train.task == "dit" else (1, 1, 1)
    t, unit = c.vae.temporal_stride, c.vae.frames_unit
    shapes = {"data": c.data} | {f"data.buckets.{i}": bucket for i, bucket in enumerate(c.data.buckets)}
    for place, shape in shapes.items():
        for name, size, patch in (("height", shape.height, ph), ("width", shape.width, pw)):
            stride = c.vae.spatial_stride * patch
            if size % stride:
                near = [n for n in (size // stride * stride, (size // stride + 1) * stride) if n]
                yield (
                    f"{place}.{name}={size} is not divisible by {stride} (VAE stride {c.vae.spatial_stride} x patch "
                    f"{patch}); use one of {' '.join(map(str, near))}"
                )
        if (shape.num_frames - 1) % unit:
            low = 1 + (shape.num_frames - 1) // unit * unit
            rule = (
                f"the VAE's temporal stride {t}"
                if unit == t
                else f"the {unit} frames that {c.vae.kind} decodes at once"
            )
            yield f"{place}.num_frames={shape.num_frames} is not 1 + a multiple of {rule}; use {low} or {low + unit}"
        elif latent_frames(c, shape.num_frames) % pt:
            near = [1 + (pt * n - 1) * t for n in (latent_frames(c, shape.num_frames) // pt + up for up in (0, 1)) if n]
            yield (
                f"{place}.num_frames={shape.num_frames} is {latent_frames(c, shape.num_frames)} latent frames, not "
                f"divisible by the {pt} of model.patch={list(c.model.patch)}; use one of {' '.join(map(str, near))}"
            )


def _recipe_faults(c: RunConfig) -> Iterator[str]:
    """Of how a VAE is trained."""
    t = c.vae_train
    yield from t.faults()
    if t.adversarial_weight and t.adversarial_start >= c.train.steps:
        yield (
            f"vae_train.adversarial_start={t.adversarial_start} is not before the end, train.steps={c.train.steps}: "
            "the discriminator would have no effect; start it earlier, or set vae_train.adversarial_weight=0"
        )
    sizes = [(c.data.height, c.data.width), *((shape.height, shape.width) for shape in c.data.shapes)]
    odd = [f"{height}x{width}" for height, width in sizes if height % 2 or width % 2]
    if t.wavelet_weight and odd:
        yield (
            f"vae_train.wavelet_weight={t.wavelet_weight:g} takes pixels in blocks of 2x2, which frames of {odd[0]} "
            "are not: use even sizes"
        )
    if t.adversarial_weight and c.parallel.vae_context != "none":
        yield (
            f"parallel.vae_context={c.parallel.vae_context} leaves each rank a part of a clip, and the discriminator "
            "judges whole ones; use parallel.shard or replicate, or vae_train.adversarial_weight=0"
        )


def _rank_faults(c: RunConfig, ranks: int) -> Iterator[str]:
    """Degrees that do not multiply to the ranks that are there."""
    p = c.parallel
    degrees = {"pipeline": p.pipeline, "replicate": p.replicate, "sequence": p.sequence, "tensor": p.tensor}
    written = " x ".join(f"{axis} {degree}" for axis, degree in degrees.items() if degree > 1)
    taken = p.ranks_per_row * p.replicate
    if p.shard and taken * p.shard != ranks:
        written = " x ".join(filter(None, (written, f"shard {p.shard}")))
        yield (
            f"the layout {written} takes {taken * p.shard} ranks, but there are {ranks}: the product must equal them; "
            f"start {taken * p.shard}" + (f", or set parallel.shard={ranks // taken}" if ranks % taken == 0 else "")
        )
    elif ranks % taken:
        yield (
            f"the layout {written} takes {taken} ranks, which do not divide the {ranks} that there are; "
            f"start a multiple of {taken}" + ("" if ranks > 1 else f", for example launch.local={taken}")
        )


def _batch_faults(c: RunConfig, data_ranks: int) -> Iterator[str]:
    train = c.train
    rows = train.micro_batch * data_ranks
    if train.global_batch % rows:
        yield (
            f"train.global_batch={train.global_batch} is not divisible by train.micro_batch x data ranks = "
            f"{train.micro_batch} x {data_ranks} = {rows}; use a multiple of {rows}"
        )
    if c.data.image_rows >= train.micro_batch:
        yield (
            f"data.image_rows={c.data.image_rows} leaves no row for a clip in train.micro_batch={train.micro_batch}; "
            f"use at most {train.micro_batch - 1}, or a train.micro_batch of at least {c.data.image_rows + 1}"
        )
    if train.warmup_steps > train.steps:
        yield f"train.warmup_steps={train.warmup_steps} exceeds train.steps={train.steps}; lower it"


def _input_faults(c: RunConfig) -> Iterator[str]:
    if c.train.task != "vae" and not c.vae.weights:
        yield "vae.weights is not set: a denoiser needs a trained VAE; give its folder (train one with train.task=vae)"
    if c.train.task == "vae" and not (c.vae.l1_weight or c.vae.l2_weight or c.vae.kl_weight):
        yield "vae.l1_weight, vae.l2_weight and vae.kl_weight are all 0: the loss would be 0; set vae.l1_weight=1"
    if not c.data.train and not c.data.mixture:
        yield "data.train is not set; give a folder written by `vidit pack`, or several as data.mixture"
    if c.data.train and c.data.mixture:
        yield f"data.train={c.data.train} and data.mixture are two ways to say the same; give one"
    if c.data.mixture and not c.data.validation and c.data.num_validation:
        yield "data.mixture has no last clips to validate on; give a folder as data.validation, or num_validation=0"
    if c.data.mixture and c.data.cache_latents:
        yield "data.cache_latents=true keeps the clips of one data set, data.mixture draws from several; leave one out"
    names = list({source.path: source.name for source in c.data.mixture}.values())
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"data.mixture holds {names.count(name)} folders named {name}, which tells their clips apart; rename one"
    paths = [source.path for source in c.data.mixture]
    for path in sorted({path for path in paths if paths.count(path) > 1}):
        yield f"data.mixture names {path} {paths.count(path)} times; give it once, with the sum of the weights"
    if c.data.cache_latents and c.data.drawn:
        yield f"data.cache_latents=true keeps one cut of each clip, which {c.data.drawn} contradicts; leave one out"


def _bucket_faults(c: RunConfig) -> Iterator[str]:
    """What training on several shapes excludes."""
    buckets = c.data.buckets
    if not buckets:
        return
    shapes = [(b.num_frames, b.height, b.width) for b in buckets]
    for shape in sorted({shape for shape in shapes if shapes.count(shape) > 1}):
        yield f"data.buckets holds {shapes.count(shape)} of {'x'.join(map(str, shape))}; give each shape once"
    if 0 < sum(b.cost > 0 for b in buckets) < len(buckets):
        yield "data.buckets gives the cost of some and not of all, and units cannot be mixed; give all or none"
    if c.data.image_rows:
        yield f"data.image_rows={c.data.image_rows} beside data.buckets; give a bucket of num_frames=1 instead"
    if c.data.cache_latents:
        yield "data.cache_latents=true keeps one shape of each clip, data.buckets asks for several; leave one out"
    if c.parallel.pipeline > 1:
        yield (
            f"parallel.pipeline={c.parallel.pipeline} sends tokens of one shape, data.buckets gives several; use "
            "tensor, sequence or shard, or one shape"
        )


def _packed_faults(c: RunConfig, geometry_known: bool) -> Iterator[str]:
    """What packed rows exclude, and what is too small for them."""
    limit, d = c.data.packed_tokens, c.data
    if c.train.micro_batch != 1:
        yield (
            f"train.micro_batch={c.train.micro_batch} beside data.packed_tokens={limit}: a packed row holds many clips "
            "and is a micro-batch by itself; set micro_batch=1, global_batch to packed rows in a step"
        )
    if any(bucket.rows for bucket in d.buckets):
        yield (
            f"data.buckets gives rows of a micro-batch, which data.packed_tokens={limit} fills with clips of all "
            "buckets; leave rows out (weight says how often a bucket is drawn)"
        )
    if c.model.relative_position == "bias":
        yield (
            f"model.relative_position=bias has one bias for all windows of a pass, and clips of data.packed_tokens="
            f"{limit} differ in them; use rope or none"
        )
    if c.train.compile:
        yield (
            "train.compile=true would compile for every new set of shapes in a packed row (data.packed_tokens="
            f"{limit}); leave it out, or train on buckets alone"
        )
    grids = [grid_of(c, b.num_frames, b.height, b.width) for b in d.buckets if geometry_known]
    largest = max((t * h * w for t, h, w in grids), default=0)
    if largest > limit:
        yield (
            f"data.packed_tokens={limit} is less than the {largest} tokens of a clip of the largest of data.buckets; "
            f"use at least {largest}"
        )


def _stream_faults(c: RunConfig) -> Iterator[str]:
    """What needs to know the clips before the first of them is read."""
    d = c.data
    if not d.streaming:
        return
    beside = {
        "data.mixture": bool(d.mixture), "data.buckets": bool(d.buckets), "data.select": bool(d.select),
        "data.cache_latents": d.cache_latents, "data.image_rows": bool(d.image_rows),
    }  # fmt: skip
    for name in (name for name, is_set in beside.items() if is_set):
        yield f"{name} needs to know all clips, data.streaming=true reads them as they come; leave one out"
    if d.num_validation and not d.validation:
        yield (
            f"data.num_validation={d.num_validation} takes the last clips of data.train, which data.streaming=true "
            "does not know; give a packed folder as data.validation, or data.num_validation=0"
        )
    if c.denoiser.frame_rate and not d.fps:
        section = "unet" if c.train.task == "unet" else "model"
        yield (
            f"{section}.frame_rate needs the frames a second of each clip, which data.streaming=true does not know; "
            "set data.fps, or pack the clips"
        )


def _caption_faults(c: RunConfig) -> Iterator[str]:
    """What is done with captions that no layer reads, whatever the defaults are: guidance costs a second pass."""
    if c.train.task == "dit" and c.text.has_second and c.model.cross_attention == "none" and c.model.pooled_text:
        yield (
            f"text.kind={c.text.kind} has no effect: model.cross_attention=none reads the pooled caption alone, which "
            f"text.second gives; give text.second.kind={c.text.second.kind} as text, and no second encoder"
        )
    if c.denoiser.reads_text:
        return
    why = "model.cross_attention=none and model.pooled_text=false read no caption"
    if c.train.task == "unet":
        why = "unet.cross_attention=false and unet.pooled_text=false read no caption"
    if c.data.caption_dropout:
        yield f"data.caption_dropout={c.data.caption_dropout:g} has no effect: {why}; set it to 0"
    if c.sample.guidance != 1:
        yield f"sample.guidance={c.sample.guidance:g} has no effect: {why}; set it to 1"
