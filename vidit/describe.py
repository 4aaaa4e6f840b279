"""A resolved run with every derived number, for `vidit config`. No torch."""

from dataclasses import asdict
from math import prod
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
        m, channels, text = config.denoiser, config.vae.latent_channels, captions_of(config)
        grid = resolved.grid
        forward = forward_flops(m, grid, channels, text.width, text.tokens, text.second)
        step = training_flops(forward, m.self_conditioning) * config.train.global_batch
        if config.data.packed_tokens:  # of rows that are full of the clips that cost most for a token
            grids = [grid_of(config, b.num_frames, b.height, b.width) for b in config.data.buckets]
            captions = channels, text.width, text.tokens, text.second
            dearest = max(forward_flops(m, g, *captions) / prod(g) for g in grids)
            row = round(dearest * config.data.packed_tokens)
            step = training_flops(row, m.self_conditioning) * config.train.global_batch
        parameters = parameter_count(m, resolved.largest_grid, channels, text.width, text.second[1])
        derived |= {
            f"{config.train.task}_parameters": parameters,
            "forward_flops_per_clip": forward,
            "training_flops_per_step": step,
            "training_flops_total": step * config.train.steps,
            "state_bytes": parameters * STATE_BYTES,
        }
        if text.unknown and m.reads_text:
            derived["estimated"] = _estimated(text)
    derived["run_dir"] = str(Path(config.directory))
    return {"config": config.model_dump(mode="json"), "derived": derived}


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
