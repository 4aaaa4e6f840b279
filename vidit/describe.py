"""A resolved run with every derived number, for `vidit config`. No torch."""

from dataclasses import asdict
from math import ceil, prod
from pathlib import Path
from typing import Any

from vidit.batching import clip_tokens, micro_batch_rows, row_cost
from vidit.config import RunConfig
from vidit.model.flops import forward_flops, parameter_count, training_flops
from vidit.resolve import grid_of, ranks_of, resolve
from vidit.text.width import Captions, captions_of
from vidit.train.layout import stages_of, with_layout
from vidit.vae.stored import adopt_vae


def describe(config: RunConfig, world_size: int | None = None) -> dict[str, Any]:
    """{"config", "derived"}: the run as it would be trained, sizes in tokens, bytes and FLOPs."""
    ranks = world_size or ranks_of(config)
    config = with_layout(adopt_vae(config, ranks), ranks)
    resolved = resolve(config, ranks)
    derived: dict[str, Any] = asdict(resolved)
    if config.data.packed_tokens:
        derived["packed_rows_total"] = derived.pop("clips_total")
        derived |= _packed(config)
    elif config.data.buckets:
        shapes = zip(config.data.buckets, micro_batch_rows(config), strict=True)
        derived["buckets"] = [
            {"shape": [b.num_frames, b.height, b.width], "rows": rows, "cost": rows * row_cost(config, b)}
            for b, rows in shapes
        ]
    if config.parallel.pipeline > 1:
        derived["stages"] = [f"{layers.start}-{layers.stop - 1}" for layers in stages_of(config)]
    if config.train.task != "vae":
        m, channels, text = config.denoiser, config.vae.latent_channels, captions_of(config)
        grid = resolved.grid
        forward = forward_flops(m, grid, channels, text.width, text.tokens, text.second)
        at_most = "_at_most" if config.data.packed_tokens else ""
        per_pass = _fullest(config, text) if config.data.packed_tokens else forward
        step = round(training_flops(per_pass, m.self_conditioning) * config.train.global_batch)
        parameters = parameter_count(m, resolved.largest_grid, channels, text.width, text.second[1])
        derived |= {
            f"{config.train.task}_parameters": parameters,
            "forward_flops_per_clip": forward,
            f"training_flops_per_step{at_most}": step,
            f"training_flops_total{at_most}": step * config.train.steps,
            "state_bytes": parameters * STATE_BYTES,
        }
        if text.unknown and m.reads_text:
            derived["estimated"] = "; ".join(filter(None, (derived.get("estimated"), _estimated(text))))
    derived["run_dir"] = str(Path(config.directory))
    return {"config": config.model_dump(mode="json"), "derived": derived}


def _packed(config: RunConfig) -> dict[str, Any]:
    """Of packed rows: their buckets, and the mean of clips in a step, as far as it is known without data."""
    tokens = [clip_tokens(config, bucket) for bucket in config.data.buckets]
    weights = [bucket.weight for bucket in config.data.buckets]
    mean = sum(weight * each for weight, each in zip(weights, tokens, strict=True)) / sum(weights)
    return {
        "buckets": [
            {"shape": [b.num_frames, b.height, b.width], "tokens": each, "cost": row_cost(config, b)}
            for b, each in zip(config.data.buckets, tokens, strict=True)
        ],
        "clips_per_step": round(config.train.global_batch * config.data.packed_tokens / mean, 1),
        "estimated": "clips_per_step is the mean of full rows where data.buckets have clips in the shares of their "
        "weights; a run reads which they have, and says before its first step how full rows are and of how many clips",
    }


def _fullest(config: RunConfig, text: Captions) -> int:
    """Forward FLOPs of a packed row that is full of the clips that cost most for a token: no row has more."""
    captions = config.vae.latent_channels, text.width, text.tokens, text.second
    grids = [grid_of(config, b.num_frames, b.height, b.width) for b in config.data.buckets]
    return ceil(max(forward_flops(config.denoiser, g, *captions) / prod(g) for g in grids) * config.data.packed_tokens)


def _estimated(text: Captions) -> str:
    """Why counts are not exact."""
    widths = {"text.path": text.width, "text.second.path": text.second[1]}
    return (
        f"the width of the text is unknown: {' and '.join(text.unknown)} is no local folder with a config.json; "
        f"numbers are for a width of {' and '.join(str(widths[option]) for option in text.unknown)}, and exact with "
        "one"
    )


# fp32 weight, gradient, average and two moments, as AdamW keeps them: at most that.
STATE_BYTES = 4 * 5
