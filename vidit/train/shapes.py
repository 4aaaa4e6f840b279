"""The shapes of the clips that a run would train on: `vidit data shapes`. Reads the index alone."""

from collections.abc import Sequence

from vidit.config import Bucket, ConfigError, RunConfig
from vidit.data.catalog import facts_of
from vidit.data.clip_list import Clips
from vidit.data.curation.table import select_clips
from vidit.data.native import Limits, native_buckets
from vidit.data.remote import Reach
from vidit.data.shards import ClipRef, read_index


def buckets_of_run(config: RunConfig, limits: Limits) -> list[Bucket]:
    """Buckets for the clips of `data.train` or `data.mixture` that rules keep, those set apart for validation left out.

    Errors of `read_index`, `select_clips` and `native_buckets`.
    """
    d = config.data
    if d.streaming:
        raise ConfigError(["data.streaming=true knows no clip before it is read; pack the tars, or leave it out"])
    reach = Reach(d.cache_dir, d.cache_gib, d.stall_s, d.patience_s)
    sources: list[Sequence[ClipRef]] = [
        select_clips(read_index(source.path, reach), (*d.select, *source.select)).refs for source in d.sources
    ]
    if d.num_validation and not d.validation:
        sources = [refs[: max(0, len(refs) - d.num_validation)] for refs in sources]
    return native_buckets(config, [facts_of(Clips.of(refs), d.fps) for refs in sources], limits)
