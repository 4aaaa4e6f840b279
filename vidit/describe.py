"""A resolved run with every derived number, for `vidit config`. No torch."""

from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from vidit.batching import clip_tokens, micro_batch_rows, row_cost
from vidit.config import RunConfig
from vidit.model.flops import forward_flops, parameter_count, training_flops
from vidit.resolve import grid_of, ranks_of, resolve
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
        derived["buckets"] = [
            {"shape": [b.num_frames, b.height, b.width], "tokens": clip_tokens(config, b), "cost": row_cost(config, b)}
            for b in config.data.buckets
        ]
    elif config.data.buckets:
        shapes = zip(config.data.buckets, micro_batch_rows(config), strict=True)
        derived["buckets"] = [
            {"shape": [b.num_frames, b.height, b.width], "rows": rows, "cost": rows * row_cost(config, b)}
            for b, rows in shapes
        ]
    if config.parallel.pipeline > 1:
        derived["stages"] = [f"{layers.start}-{layers.stop - 1}" for layers in stages_of(config)]
    if config.train.task != "vae":
        m, channels, text = config.denoiser, config.vae.latent_channels, config.text
        grid = resolved.grid
        forward = forward_flops(m, grid, channels, text.width, text.max_tokens, config.second_captions)
        step = training_flops(forward, m.self_conditioning) * config.train.global_batch
        if config.data.packed_tokens:  # of rows that are full of the clips that cost most for a token
            grids = [grid_of(config, b.num_frames, b.height, b.width) for b in config.data.buckets]
            captions = channels, text.width, text.max_tokens, config.second_captions
            dearest = max(forward_flops(m, g, *captions) / prod(g) for g in grids)
            row = round(dearest * config.data.packed_tokens)
            step = training_flops(row, m.self_conditioning) * config.train.global_batch
        parameters = parameter_count(m, resolved.largest_grid, channels, text.width, config.second_captions[1])
        derived |= {
            f"{config.train.task}_parameters": parameters,
            "forward_flops_per_clip": forward,
            "training_flops_per_step": step,
            "training_flops_total": step * config.train.steps,
            "state_bytes": parameters * STATE_BYTES,
        }
    derived["run_dir"] = str(Path(config.directory))
    return {"config": config.model_dump(mode="json"), "derived": derived}


# fp32 weight, gradient, average and two moments, as AdamW keeps them: at most that.
STATE_BYTES = 4 * 5
