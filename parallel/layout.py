"""A layout: how many ranks each of the five axes has, and whether that fits a machine and a model.

Axes from the outside in: pipeline, replicate, shard, sequence, tensor. Rank numbers run fastest along
`tensor`, so the ranks of one tensor group are neighbours and lie in one node, then those of one sequence group:
these two talk in every block. `replicate` x `shard` is what the batch is divided over.
Arithmetic only, no torch: every fault is known before a process group is made, on a login node too.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

AXES = ("pipeline", "replicate", "shard", "sequence", "tensor")


class LayoutError(ValueError):
    """Every fault of a layout, one a line; each names the numbers, the rule and the cure."""

    def __init__(self, faults: Sequence[str]):
        super().__init__("\n".join(faults) if len(faults) == 1 else f"{len(faults)} faults:\n- " + "\n- ".join(faults))
        self.faults = tuple(faults)


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, smallest first."""
    return [n for n in range(1, number + 1) if number % n == 0]


def words(numbers: Sequence[int]) -> str:
    return " ".join(str(n) for n in numbers)


@dataclass(frozen=True)
class Layout:
    """Degrees of the five axes; their product is the number of ranks."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    sequence: int = 1
    tensor: int = 1

    @property
    def degrees(self) -> tuple[int, ...]:
        """In the order of AXES."""
        return self.pipeline, self.replicate, self.shard, self.sequence, self.tensor

    @property
    def world(self) -> int:
        product = 1
        for degree in self.degrees:
            product *= degree
        return product

    @property
    def data(self) -> int:
        """How many ways the rows of a batch are divided."""
        return self.replicate * self.shard

    def faults(self, world: int, ranks_per_node: int | None = None) -> Iterator[str]:
        """What keeps this layout from running on `world` ranks, `ranks_per_node` of them in each node."""
        small = [f"parallel.{axis}={n}" for axis, n in zip(AXES, self.degrees, strict=True) if n < 1]
        if small:
            yield f"{' and '.join(small)}: a degree is at least 1; use 1 for an axis that is not wanted"
            return
        if self.world != world:
            yield self._product_fault(world)
        if ranks_per_node is None or ranks_per_node >= world:
            return
        if world % ranks_per_node:
            yield (
                f"{world} ranks do not fill nodes of {ranks_per_node}; start a multiple of {ranks_per_node}, "
                f"or use one of {words(divisors(world))} ranks in each node"
            )
        elif ranks_per_node % self.tensor:
            yield (
                f"parallel.tensor={self.tensor} does not divide the {ranks_per_node} ranks of a node: a tensor group "
                f"stays inside one; use one of {words(divisors(ranks_per_node))}"
            )
        else:
            yield from self._sequence_fault(ranks_per_node)

    def _product_fault(self, world: int) -> str:
        written = " x ".join(f"{axis} {n}" for axis, n in zip(AXES, self.degrees, strict=True))
        rest = self.world // self.shard
        if world % rest:
            cure = f"the axes other than shard take {rest} ranks, which do not divide {world}: start a multiple of them"
        else:
            cure = f"set parallel.shard={world // rest}, or start {self.world} ranks"
        return (
            f"the layout {written} = {self.world} ranks, but {world} are started: the product must equal them; {cure}"
        )

    def _sequence_fault(self, ranks_per_node: int) -> Iterator[str]:
        """A sequence group lies in one node, or where it is larger than that, in whole nodes."""
        places = ranks_per_node // self.tensor
        if places % self.sequence and self.sequence % places:
            legal = [*divisors(places), *(places * n for n in (2, 4, 8))]
            yield (
                f"parallel.sequence={self.sequence} with parallel.tensor={self.tensor} neither divides nor fills nodes "
                f"of {ranks_per_node} ranks ({places} places for a sequence group); use one of {words(legal)}"
            )

    def head_faults(self, num_heads: int) -> Iterator[str]:
        """What keeps `num_heads` attention heads from being divided: `tensor`, then what is left of them."""
        if num_heads % self.tensor:
            yield (
                f"{num_heads} heads are not divisible by parallel.tensor={self.tensor}; "
                f"use one of {words(divisors(num_heads))}"
            )

    def width_faults(self, name: str, width: int) -> Iterator[str]:
        """What keeps the columns of a layer, `name` of the config, from being divided by `tensor`."""
        if width % self.tensor:
            near = [n for n in (width // self.tensor * self.tensor, -(-width // self.tensor) * self.tensor) if n]
            yield (
                f"{name}={width} is not divisible by parallel.tensor={self.tensor}; use "
                f"{' or '.join(map(str, near))}, or parallel.tensor of one of {words(divisors(width))}"
            )

    def ulysses_faults(self, num_heads: int) -> Iterator[str]:
        """The same for a sequence axis that divides heads (DeepSpeed-Ulysses, 2309.14509)."""
        if num_heads % self.tensor:
            return
        heads = num_heads // self.tensor
        if heads % self.sequence:
            of = f"{num_heads} heads" if self.tensor == 1 else f"{heads} heads ({num_heads} / tensor {self.tensor})"
            yield (
                f"{of} are not divisible by parallel.sequence={self.sequence} in the kind ulysses; "
                f"use one of {words(divisors(heads))}"
            )

    def nodes_of(self, axis: str, ranks_per_node: int) -> int:
        """How many nodes one group of `axis` touches, at most."""
        place = AXES.index(axis)
        stride = 1
        for degree in self.degrees[place + 1 :]:
            stride *= degree
        span = self.degrees[place]
        if stride >= ranks_per_node:
            return span
        return max(1, -(-span * stride // ranks_per_node))


def refuse(faults: Iterable[str]) -> None:
    """Raise LayoutError with all of them, where there are any."""
    found = list(faults)
    if found:
        raise LayoutError(found)
