"""The layout of a run, and whether it fits the model, the machine and the batch: every fault, before anything starts.

Arithmetic only, no torch and no process group, so that the command line can refuse a run before it starts ranks.
"""

from collections.abc import Iterator

from parallel.layout import Layout
from vidit.config import RunConfig, refuse
from vidit.resolve import faults, resolve


def layout_of(config: RunConfig) -> Layout:
    """Degrees of the five axes on the ranks that the config is made for."""
    p = config.parallel
    return Layout(p.pipeline, p.replicate, resolve(config).shard, p.sequence, p.tensor)


def with_layout(config: RunConfig, num_ranks: int, ranks_per_node: int | None = None) -> RunConfig:
    """The config with the degree of every axis written down, for `num_ranks` ranks.

    Raises ConfigError with every fault of the run and of its layout.
    """
    refuse(faults(config, num_ranks))
    shard = resolve(config, num_ranks).shard
    fixed = config.model_copy(update={"parallel": config.parallel.model_copy(update={"shard": shard})})
    refuse(layout_faults(fixed, ranks_per_node))
    return fixed


def layout_faults(config: RunConfig, ranks_per_node: int | None = None) -> Iterator[str]:
    """What keeps the model and the batch of a config from being divided as its layout says."""
    layout = layout_of(config)
    yield from layout.faults(layout.world, ranks_per_node)
