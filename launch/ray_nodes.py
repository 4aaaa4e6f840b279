"""On how many nodes a run can be trained: what the driver decides, without Ray."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from vidit.config import ConfigError, RunConfig
from vidit.config_source import load_config
from vidit.train.layout import with_layout
from vidit.vae.stored import adopt_vae, find_vae


def config_of(command: Sequence[str]) -> RunConfig:
    """The config of `... train CONFIG [override ...]`, with what is left to the number of ranks still open."""
    name, *overrides = command[list(command).index("train") + 1 :]
    return load_config(name, overrides)


def check(config: RunConfig, nodes: int, devices: int) -> None:
    """ConfigError with every fault of the run on that many nodes."""
    ranks = nodes * devices
    with_layout(adopt_vae(find_vae(config), ranks), ranks, devices)


def node_counts(config: RunConfig, most: int, least: int, devices: int) -> list[int]:
    """The numbers of nodes from `most` down to `least` on which the run can be trained.

    Both ends must be possible: ConfigError with the faults otherwise. Those between that are not are left out.
    """
    counts = []
    for nodes in range(most, least - 1, -1):
        try:
            check(config, nodes, devices)
        except ConfigError as error:
            if nodes not in (most, least):
                continue
            option = "--nodes" if nodes == most else "--min-nodes"
            raise ConfigError([f"{option}={nodes} x {devices} devices: {fault}" for fault in error.faults]) from error
        counts.append(nodes)
    return counts


def has(resources: Mapping[str, float], bundle: Mapping[str, float]) -> bool:
    """Whether a node is large enough, whatever runs there now."""
    return all(resources.get(name, 0.0) >= amount for name, amount in bundle.items())


def refusal(wanted: int, bundle: Mapping[str, float], nodes: Sequence[Mapping[str, float]], waited_s: float) -> str:
    """Why a job does not start: what it wants, what the cluster has, the cure."""
    large = sum(has(node, bundle) for node in nodes)
    sizes = Counter(_size(node, bundle) for node in nodes)
    there = "; ".join(f"{count} with {size}" for size, count in sizes.most_common())
    what = f"{wanted} nodes with {_size(bundle, bundle)} each are wanted"
    if large >= wanted:
        return (
            f"{what}, and {large} such nodes are there but have not become free in {waited_s:g} s; wait for what runs "
            "on them (`ray status`), or give --min-nodes to go on with fewer"
        )
    return (
        f"{what}, but {large} of the cluster's {len(nodes)} nodes are that large ({there}), and that has not changed "
        f"in {waited_s:g} s; start more such nodes, give fewer --nodes or --devices, or --min-nodes to go on with fewer"
    )


def _size(node: Mapping[str, float], names: Iterable[str]) -> str:
    return " ".join(f"{name}={node.get(name, 0.0):g}" for name in names)
