"""How many rows a micro-batch of each shape holds, by what a row costs. No torch."""

from vidit.config import Bucket, RunConfig
from vidit.model.flops import forward_flops
from vidit.resolve import grid_of
from vidit.text.width import captions_by_config


def row_cost(config: RunConfig, shape: Bucket) -> float:
    """What a row of a shape costs: as the config says, else the denoiser's forward FLOPs, or a VAE's pixels."""
    c = config
    if shape.cost:
        return shape.cost
    if c.train.task == "vae":
        return float(shape.num_frames * shape.height * shape.width)
    grid = grid_of(c, shape.num_frames, shape.height, shape.width)
    text = captions_by_config(c)
    return float(forward_flops(c.denoiser, grid, c.vae.latent_channels, text.width, text.tokens, text.second))


def bucket_costs(config: RunConfig) -> list[float]:
    """What a row of each bucket costs, as a share of the dearest, on which the order of clips stands; empty without."""
    costs = [row_cost(config, shape) for shape in config.data.shapes] if config.data.buckets else []
    return [round(cost / max(costs), 9) for cost in costs]


def micro_batch_rows(config: RunConfig) -> tuple[int, ...]:
    """Rows of a micro-batch of each bucket: `rows`, or as many as cost what `train.micro_batch` of the dearest do."""
    shapes = config.data.shapes
    costs = [row_cost(config, shape) for shape in shapes]
    budget = config.train.micro_batch * max(costs)
    return tuple(shape.rows or max(1, round(budget / cost)) for shape, cost in zip(shapes, costs, strict=True))


def clip_tokens(config: RunConfig, shape: Bucket) -> int:
    """The video tokens of a clip of a shape."""
    frames, height, width = grid_of(config, shape.num_frames, shape.height, shape.width)
    return frames * height * width


def numbers_per_step(config: RunConfig) -> int:
    """How many numbers are set aside for the rows of a step; of packed rows for their clips."""
    if limit := config.data.packed_tokens:
        return config.train.global_batch * (limit // min(clip_tokens(config, shape) for shape in config.data.shapes))
    return config.train.global_batch // config.train.micro_batch * max(micro_batch_rows(config))
