"""Every section of a run, as frozen pydantic models.

A config is a value: `configs/*.py` build one, the command line overrides single fields
(`train.steps=100`, `vidit/overrides.py`), the run directory keeps it as `config.json`. Each section says what
is wrong with it alone (`faults`); `vidit/resolve.py` checks the sections together and computes what follows
from them. No torch, so that a login node can check a run in milliseconds: what the rest of the project also
needs to know of a rule (`LEGAL_TARGETS`) stands here, as data.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

Window = tuple[int, int, int]
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]

ForwardProcess = Literal["flow", "vp", "edm"]
Target = Literal["flow", "eps", "x", "v", "edm"]
Density = Literal["uniform", "logit_normal", "log_normal"]
Sampler = Literal["ddim", "dpmpp_2m", "heun", "euler"]
LEGAL_TARGETS: dict[ForwardProcess, tuple[Target, ...]] = {
    "flow": ("flow", "x", "v"),
    "vp": ("eps", "x", "v"),
    "edm": ("edm",),
}
LEGAL_DENSITIES: dict[ForwardProcess, tuple[Density, ...]] = {
    "flow": ("uniform", "logit_normal"),
    "vp": ("uniform", "logit_normal"),
    "edm": ("log_normal",),
}

# Rows of the byte encoder's table that no n-gram is hashed to: padding, begin token.
RESERVED_TEXT_ROWS = 2
# RoPE turns pairs of a head's dims, at least one pair for each of time, height and width.
MIN_ROPE_HEAD_DIM = 6


class Section(BaseModel):
    """Base of every section: immutable, and a field that does not exist is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Text(Section):
    """How a caption becomes features. `bytes` is trained jointly and needs no files."""

    kind: Literal["bytes", "t5", "umt5", "clip"] = "bytes"
    path: str | None = Field(None, description="local folder or hub name of a pretrained encoder")
    revision: str | None = Field(None, description="commit of the hub repository")
    width: int = Field(256, gt=0, description="feature width E; a pretrained encoder brings its own")
    num_layers: int = Field(2, ge=0)
    num_heads: int = Field(4, gt=0)
    max_tokens: int = Field(32, gt=1, description="L, begin token included")
    hash_buckets: int = Field(8192, gt=0, description="rows of the n-gram table of `bytes`, 2 of them reserved")

    def faults(self) -> Iterator[str]:
        if self.kind != "bytes":
            if not self.path:
                yield f"text.kind={self.kind} needs text.path (a local folder or hub name)"
            return
        if self.width % self.num_heads or self.width % 2:
            legal = " ".join(str(n) for n in range(1, 65) if self.width % n == 0)
            cure = "use an even text.width" if self.width % 2 else f"use one of {legal}"
            yield f"text.width={self.width} must be even and divisible by text.num_heads={self.num_heads}; {cure}"
        if self.hash_buckets <= RESERVED_TEXT_ROWS:
            yield (
                f"text.hash_buckets={self.hash_buckets} leaves no row beside the {RESERVED_TEXT_ROWS} reserved ones; "
                f"use at least {RESERVED_TEXT_ROWS + 1}"
            )


class Vae(Section):
    """A causal 3D VAE (MAGVIT-v2 style, as W.A.L.T. uses it)."""

    weights: str | None = Field(None, description="folder with config.json and model.safetensors")
    latent_channels: int = Field(8, gt=0)
    patch: int = Field(1, gt=0, description="pixels folded p x p into channels before the first convolution")
    base_channels: int = Field(128, gt=0)
    multipliers: tuple[Positive, ...] = Field((1, 2, 2, 4), min_length=1, description="channels of each level / base")
    num_res_blocks: tuple[NotNegative, ...] = Field((4, 4, 4, 4), description="residual blocks of each encoder level")
    decoder_res_blocks: tuple[NotNegative, ...] = Field(
        (4, 4, 4, 4), description="the same of the decoder, finest first"
    )
    spatial_down: tuple[bool, ...] = Field((True, True, True), description="level i halves H, W at its end")
    temporal_down: tuple[bool, ...] = Field((False, True, True), description="level i halves T at its end")
    half_weights: bool = Field(False, description="export the weights in fp16")
    l1_weight: float = Field(1.0, ge=0)
    l2_weight: float = Field(0.0, ge=0)
    kl_weight: float = Field(1e-6, ge=0)

    @property
    def spatial_stride(self) -> int:
        return int(self.patch * 2 ** sum(self.spatial_down))

    @property
    def temporal_stride(self) -> int:
        return int(2 ** sum(self.temporal_down))

    def faults(self) -> Iterator[str]:
        levels = len(self.multipliers)
        for name in ("num_res_blocks", "decoder_res_blocks"):
            if len(getattr(self, name)) != levels:
                yield f"vae.{name} has {len(getattr(self, name))} entries for {levels} levels; give {levels}"
        widths = [self.base_channels * m for m in self.multipliers]
        if widths[-1] % self.latent_channels:
            yield (
                f"vae.latent_channels={self.latent_channels} does not divide the last level's {widths[-1]} channels "
                "(base_channels x multiplier), as the latent's shortcut needs; change one of them"
            )
        for name in ("spatial_down", "temporal_down"):
            if len(getattr(self, name)) != levels - 1:
                yield f"vae.{name} has {len(getattr(self, name))} entries; {levels} levels have {levels - 1} joints"
        for fine, coarse, space, time in zip(
            widths, widths[1:], self.spatial_down, self.temporal_down, strict=False
        ):  # a shortcut maps the folded channels of the finer level to groups of the coarser
            depth = fine * (4 if space else 1) * (2 if time else 1)
            if depth % coarse:
                yield (
                    f"vae: a joint folds {fine} channels to {depth}, which {coarse} do not divide; change "
                    "vae.base_channels or vae.multipliers"
                )


class Model(Section):
    """A spatiotemporal patch-token DiT with window attention (W.A.L.T., 2312.06662)."""

    num_layers: int = Field(24, gt=0)
    width: int = Field(1024, gt=0)
    num_heads: int = Field(16, gt=0)
    mlp_width: int = Field(4096, gt=0)
    patch: int = Field(1, gt=0, description="p: each latent frame is cut into p x p patches")
    windows: tuple[Window, ...] = Field(
        ((1, 0, 0), (0, 8, 8)),
        min_length=1,
        description="attention windows (t, h, w) in tokens, used by the blocks in turn; 0 = the whole axis",
    )
    image_attention: Literal["identity", "frame"] = Field(
        "identity",
        description="images in windows that span frames: pass unchanged (W.A.L.T.), or attend within their frame",
    )
    relative_position: Literal["bias", "rope", "none"] = "bias"
    absolute_position: bool = True
    qk_norm: bool = True
    cross_attention: Literal["none", "per_frame", "all"] = Field(
        "per_frame", description="blocks that attend to text: those whose window is one latent frame, or all"
    )
    cross_keys: Literal["text", "video_and_text"] = "video_and_text"
    pooled_text: bool = Field(False, description="add the pooled caption to the time embedding (GenTron)")
    adaln_rank: int = Field(2, ge=0, description="AdaLN-LoRA rank; 0 gives every block a modulation of its own")
    self_conditioning: float = Field(0.9, ge=0, le=1, description="probability of a second pass; 0 removes it")
    attention_backend: Literal["auto", "sdpa", "flash"] = "auto"

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The named geometry of `PRESETS`, with fields changed. ValueError for a name it does not hold."""
        if name not in PRESETS:
            raise ValueError(f"no model preset {name!r}; use one of {' '.join(PRESETS)}")
        layers, width, heads, mlp, more = PRESETS[name]
        fields = {"num_layers": layers, "width": width, "num_heads": heads, "mlp_width": mlp, **more, **changes}
        return cls(**fields)

    @property
    def reads_text(self) -> bool:
        """Whether any caption reaches a token."""
        return self.cross_attention != "none" or self.pooled_text

    def faults(self) -> Iterator[str]:
        if self.width % self.num_heads:
            legal = " ".join(str(n) for n in range(1, 65) if self.width % n == 0)
            yield f"model.width={self.width} is not divisible by model.num_heads={self.num_heads}; use one of {legal}"
        elif self.relative_position == "rope":
            head_dim = self.width // self.num_heads
            if head_dim % 2 or head_dim < MIN_ROPE_HEAD_DIM:
                yield (
                    f"model.relative_position=rope needs an even head dim of at least {MIN_ROPE_HEAD_DIM}, not "
                    f"{head_dim} ({self.width} / {self.num_heads} heads); change model.num_heads or model.width"
                )
        if any(size < 0 for window in self.windows for size in window):
            yield f"model.windows={self.windows} holds a negative size; use 0 for the whole axis"
        if self.attention_backend == "flash" and self.relative_position == "bias":
            yield "model.attention_backend=flash takes no position bias; set model.relative_position=rope"
        if self.attention_backend == "flash" and self.cross_attention != "none" and self.cross_keys != "text":
            yield "model.attention_backend=flash takes no mask over text keys; set model.cross_keys=text"
        if self.cross_attention == "per_frame" and all(window[0] != 1 for window in self.windows[: self.num_layers]):
            yield (
                f"model.cross_attention=per_frame, but none of model.windows={self.windows} is one latent frame "
                "(1, h, w): no block would see the text; use cross_attention=all or none, or add such a window"
            )


# layers, width, heads, MLP width, changes. S, B, L, XL are the DiT ladder (papers.md 0b) with W.A.L.T.'s
# blocks; L and XL are its UCF models (313M, 460M), SR1 and SR2 its super-resolution stages (1.3B, 419M).
# 3B takes 9216, printed as the hidden size, for the MLP width: the width itself is unpublished.
PRESETS: dict[str, tuple[int, int, int, int, dict[str, Any]]] = {
    "demo": (4, 128, 4, 512, {"relative_position": "rope", "self_conditioning": 0.0, "pooled_text": True}),
    "S": (12, 384, 6, 1536, {}),
    "B": (12, 768, 12, 3072, {}),
    "L": (24, 1024, 16, 4096, {}),
    "XL": (28, 1152, 16, 4608, {}),
    "SR1": (40, 1408, 16, 6144, {"cross_attention": "all", "patch": 2}),
    "SR2": (24, 1024, 16, 4096, {"cross_attention": "all", "patch": 4}),
    "3B": (52, 1792, 16, 9216, {"cross_attention": "all"}),
    "7B": (32, 3584, 28, 14336, {"cross_attention": "all"}),
}


class Diffusion(Section):
    """Forward process, target, timestep density, loss weight."""

    path: ForwardProcess = "flow"
    target: Target = "flow"
    vp_schedule: Literal["linear", "scaled_linear", "cosine"] = "linear"
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    num_train_steps: int = Field(1000, gt=1)
    zero_terminal_snr: bool = True
    snr_shift: float = Field(1.0, gt=0, description="SNR is divided by it (CogVideoX-2B: 3)")
    sigma_data: float = Field(1.0, gt=0)
    sigma_min: float = Field(0.002, gt=0)
    sigma_max: float = Field(80.0, gt=0)
    density: Density = "logit_normal"
    density_mean: float = 0.0
    density_std: float = Field(1.0, gt=0)
    stratified: bool = Field(True, description="one stratum of the density for each clip of the global batch")
    shift: Literal["none", "constant", "sqrt_pixels_frames", "linear_tokens"] = "none"
    shift_value: float = Field(1.0, gt=0)
    weighting: Literal["none", "min_snr"] = "none"
    min_snr_gamma: float = Field(5.0, gt=0)

    def faults(self) -> Iterator[str]:
        yield from self.path_faults()
        yield from self.target_faults()
        yield from self.density_faults()

    def path_faults(self) -> Iterator[str]:
        if self.path == "vp" and self.shift != "none":
            yield f"diffusion.shift={self.shift} does not apply to path vp; use none and set diffusion.snr_shift"
        if self.path == "vp" and self.vp_schedule != "cosine" and self.beta_start >= self.beta_end:
            yield (
                f"diffusion.beta_start={self.beta_start:g} is not below diffusion.beta_end={self.beta_end:g}; "
                "betas grow with t, swap them"
            )
        if self.path == "edm" and self.sigma_min >= self.sigma_max:
            yield (
                f"diffusion.sigma_min={self.sigma_min:g} is not below diffusion.sigma_max={self.sigma_max:g}; "
                "lower sigma_min"
            )

    def target_faults(self) -> Iterator[str]:
        if self.target not in LEGAL_TARGETS[self.path]:
            legal = " ".join(LEGAL_TARGETS[self.path])
            yield f"diffusion.target={self.target} is not defined on path {self.path}; use one of {legal}"
        elif self.target == "eps" and self.zero_terminal_snr:
            yield (
                "diffusion.target=eps is undefined at zero terminal SNR, where x_hat = (x_t - s e) / a divides by "
                "a = 0; use target=v or x, or zero_terminal_snr=false"
            )
        if self.weighting == "min_snr" and self.path == "edm":
            yield "diffusion.weighting=min_snr and EDM's own lambda(sigma) exclude each other; use none"

    def density_faults(self) -> Iterator[str]:
        if self.density not in LEGAL_DENSITIES[self.path]:
            legal = " ".join(LEGAL_DENSITIES[self.path])
            yield f"diffusion.density={self.density} does not fit path {self.path}; use one of {legal}"


class Bucket(Section):
    """One shape of a run that trains on several."""

    num_frames: Positive
    height: Positive
    width: Positive
    rows: NotNegative = Field(
        0, description="clips in a micro-batch; 0 = as many as cost what train.micro_batch of the dearest do"
    )
    keep: float = Field(1.0, gt=0, le=1, description="chance that a clip which fits stays; else the next smaller one")
    weight: float = Field(1.0, gt=0, description="micro-batches drawn, next to as many as its clips fill")
    cost: float = Field(0.0, ge=0, description="what a row costs, such as measured seconds, of all or none; 0 = FLOPs")


class Source(Section):
    """One data set of a mixture."""

    path: str = Field(min_length=1)
    weight: float = Field(gt=0, description="share of the clips drawn, next to the weights of the others")
    select: tuple[str, ...] = Field((), description="rules over its scores, besides those of data.select")

    @property
    def name(self) -> str:
        """What records put before the keys of its clips."""
        return self.path.rstrip("/").rpartition("/")[2]


class Data(Section):
    """Clips: where they are and how they are cut."""

    train: str = Field("", description="folder written by `vidit pack` (WebDataset shards and index), or its URL")
    mixture: tuple[Source, ...] = Field((), description="several such folders and their weights, instead of train")
    buckets: tuple[Bucket, ...] = Field((), description="shapes to train on, instead of the one below")
    validation: str | None = Field(None, description="the same for validation; none = the last clips of train")
    num_validation: int = Field(64, ge=0, description="clips of fixed noise and timesteps in each validation")
    num_frames: int = Field(17, gt=0)
    height: int = Field(128, gt=0)
    width: int = Field(128, gt=0)
    select: tuple[str, ...] = Field((), description="rules over the scores of `vidit score`, such as 'motion >= q0.25'")
    fps: float = Field(0.0, ge=0, le=1000, description="frames a second after resampling; 0 keeps each clip's own")
    random_crop: bool = Field(False, description="random crop and start (keyed); else the middle")
    image_rows: int = Field(0, ge=0, description="rows of a micro-batch made of T independent images each")
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="probability of the empty caption")
    cache_latents: bool = Field(False, description="encode every clip once, before the first step")
    num_workers: int = Field(1, ge=0)
    prefetch: int = Field(4, gt=0, description="micro-batches ready ahead of the step, per worker")
    max_skipped: float = Field(0.01, ge=0, le=1, description="fraction of clips that may fail to decode")
    cache_dir: str = Field("", description="local folder that keeps what was read from a URL; empty = nothing is kept")
    cache_gib: float = Field(32.0, gt=0, description="most that data.cache_dir holds; what was used longest ago goes")
    stall_s: float = Field(
        30.0, gt=0, description="how long a remote read waits for its next byte before it is retried"
    )
    patience_s: float = Field(
        300.0, gt=0, description="how long a remote read is retried without a byte; then an error"
    )

    @property
    def is_remote(self) -> bool:
        """Whether any of the clips lie behind a URL."""
        places = [source.path for source in self.mixture] + [self.train, self.validation or ""]
        return any("://" in place for place in places)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The data sets to train on."""
        return self.mixture or (Source(path=self.train, weight=1.0),)

    @property
    def shapes(self) -> tuple[Bucket, ...]:
        """The shapes to train on; validation and samples have num_frames, height and width."""
        return self.buckets or (Bucket(num_frames=self.num_frames, height=self.height, width=self.width),)


class Train(Section):
    """Optimisation, precision and the rhythm of a run."""

    task: Literal["dit", "vae"] = "dit"
    steps: int = Field(1000, gt=0)
    global_batch: int = Field(32, gt=0, description="clips (rows) in one optimizer step, over all ranks")
    micro_batch: int = Field(32, gt=0, description="rows in one forward and backward pass of one rank")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon for the matrices of the layers, AdamW for the rest, one learning rate"
    )
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    learning_rate: float = Field(1e-4, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    final_learning_rate: float = Field(0.0, ge=0, description="the cosine's end, as a fraction of the peak")
    clip_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    precision: Literal["auto", "fp32", "bf16", "fp64"] = Field(
        "auto",
        description="compute dtype; master weights are fp32. auto = bf16 where the device has it, else fp32; fp64 is "
        "for proofs, weights included",
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none", description="what the backward pass runs again: nothing, all but matrix products and attention, all"
    )
    compile: bool = Field(False, description="compile each block with inductor")
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: int = Field(10, gt=0)
    checkpoint_every: int = Field(500, gt=0)
    keep_checkpoints: int = Field(2, gt=0)
    keep_every: int = Field(0, ge=0, description="also keep every checkpoint whose step is a multiple; 0 = none")
    async_checkpoint: bool = Field(True, description="write checkpoints beside the training")
    validate_every: int = Field(500, gt=0)
    num_time_bands: int = Field(5, gt=0, description="bands of the timestep density in validation")
    sample_every: int = Field(0, ge=0, description="sample videos every so many steps; 0 = only at the end")


class Parallel(Section):
    """The layout: how many ranks share the model, the tokens and the rows; the product of the axes is all ranks."""

    pipeline: Positive = 1
    replicate: Positive = Field(1, description="copies of the sharded state (HSDP)")
    shard: NotNegative = Field(0, description="ranks that divide rows and state; 0 = all that the other axes leave")
    sequence: Positive = Field(1, description="ranks that divide the video tokens of the same rows")
    tensor: Positive = 1
    sequence_kind: Literal["auto", "ulysses", "ring", "ulysses_ring", "window"] = "auto"
    ulysses: NotNegative = Field(0, description="ranks of the Ulysses part of ulysses_ring; 0 = as many as fit")
    sharded_norms: bool | Literal["auto"] = Field(
        "auto", description="tensor ranks divide the tokens between their regions (2205.05198); auto: where they can"
    )
    zero: Literal[0, 1, 2, 3] = Field(
        3, description="what shard divides: optimizer state, gradients too, parameters too; 0 = nothing (DDP)"
    )
    cpu_offload: bool = Field(False, description="parameters and optimizer state stay in host memory")
    reduce_dtype: Literal["fp32", "bf16"] = Field("fp32", description="in which gradients are summed over ranks")
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = "1f1b"
    stages_per_rank: Positive = Field(
        1, description="stages of each pipeline rank, for interleaved; zero_bubble: 1 or 2"
    )
    vae_context: Literal["none", "time", "rows"] = Field(
        "none", description="what the sequence ranks divide in the VAE: its frames, or its pictures from top to bottom"
    )
    count_communication: bool = Field(
        False, description="count calls and bytes of every collective of the second step, on every rank"
    )
    timeout_s: float = Field(600.0, ge=1, le=1e6, description="how long ranks wait for one another before all stop")

    @property
    def ranks_per_row(self) -> int:
        """Ranks that work on the same rows of a batch."""
        return self.pipeline * self.sequence * self.tensor


class Launch(Section):
    """Where the ranks of a run are started."""

    local: Positive = Field(1, description="ranks on this machine; 1 = this process")


class Sample(Section):
    """How videos are drawn from a trained model."""

    sampler: Sampler = "euler"
    num_steps: int = Field(50, gt=0)
    guidance: float = Field(7.5, ge=0, description="classifier-free guidance scale s: u + s (c - u)")
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    micro_batch: int = Field(8, gt=0)
    prompts: tuple[str, ...] = Field((), description="captions sampled during training")


class RunConfig(Section):
    """One run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    run_dir: str = Field("", description="where the run writes; empty = runs/<name>")
    text: Text = Text()
    vae: Vae = Vae()
    model: Model = Model()
    diffusion: Diffusion = Diffusion()
    data: Data = Data()
    train: Train = Train()
    parallel: Parallel = Parallel()
    launch: Launch = Launch()
    sample: Sample = Sample()

    @property
    def directory(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}")

    def to_json(self) -> str:
        return self.model_dump_json(indent=1)


class ConfigError(ValueError):
    """Every fault of a config, one a line."""

    def __init__(self, faults: Sequence[str]):
        super().__init__("\n".join(faults) if len(faults) == 1 else f"{len(faults)} faults:\n- " + "\n- ".join(faults))
        self.faults = tuple(faults)


def refuse(faults: Iterable[str]) -> None:
    """Raise ConfigError with all of them, where there are any."""
    found = list(faults)
    if found:
        raise ConfigError(found)


def whole_window(window: Window, grid: tuple[int, int, int]) -> Window:
    """Replace 0 (the whole axis) by the grid's size and clamp what is larger than the grid."""
    t, h, w = (min(size, axis) or axis for size, axis in zip(window, grid, strict=True))
    return t, h, w
