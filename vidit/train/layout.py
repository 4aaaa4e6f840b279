"""The layout of a run, and whether it fits the model, the machine and the batch: every fault, before anything starts.

Arithmetic only, no torch and no process group, so that the command line can refuse a run before it starts ranks.
"""

from parallel.layout import Layout
from vidit.config import RunConfig
from vidit.resolve import resolve


def layout_of(config: RunConfig, num_ranks: int | None = None) -> Layout:
    """Degrees of the five axes on `num_ranks` ranks, or those the config is made for."""
    p = config.parallel
    shard = resolve(config, num_ranks).shard
    return Layout(p.pipeline, p.replicate, shard, p.sequence, p.tensor)
