"""Window parallelism: every window of a layer lies whole on one rank, so its attention needs no communication.

Windows are dealt to ranks as contiguous runs (`dealing.py`), and a rank holds the real tokens of its windows, one
window after the other; ranks may hold different numbers. Where the next block has another window, the residual
stream moves by one all-to-all in which only tokens that change their rank travel: 2 exchanges of a width D a pair of
blocks, where Ulysses has 8. What tells where tokens are, rotary angles among it, is cut for every deal at once and
each block takes its own.

How tokens lie in front of a block follows from the windows of the block and of the one before, never from what ran
earlier: a pipeline stage begins anywhere. The gradient rule is that of `sequence.py`: parameters' gradients are sums
over tokens, so that ranks with more of them simply contribute more to the mean.

Of the core: `within(q, k, v, grid, bias, text, own)` attends in windows that are cut already, (B * windows, W, N, K)
with zeros where a window reaches past the grid, `own` being their slice of all windows of the clip.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from parallel.collectives import deal, gather, split
from parallel.dealing import (
    AnyWindow,
    Window,
    dealing_faults,
    entries,
    owners,
    runs,
    skipped_to,
    whole_window,
    window_tokens,
)
from parallel.layout import LayoutError
from parallel.shares import grid_of, pad_to


@dataclass(frozen=True)
class Deal:
    """How the tokens of one grid are dealt for one window, seen by one rank.

    counts: tokens of each rank.
    windows: this rank's, as a slice of all.
    tokens: number in the clip of each of this rank's tokens.
    padded: (n, largest count) the same for all ranks, flattened, padding pointing to token 0.
    back: where in `padded` each token of the clip is.
    places: where this rank's tokens are among the entries of its windows; None where its windows are all full.
    """

    counts: tuple[int, ...]
    windows: slice
    tokens: Tensor
    padded: Tensor
    back: Tensor
    places: Tensor | None


@dataclass(frozen=True)
class Move:
    """From one deal to another, seen by one rank: rows to send, in order, and where the arriving ones belong."""

    send: tuple[int, ...]
    receive: tuple[int, ...]
    leaving: Tensor
    arriving: Tensor


class Deals:
    """The deals and moves of a model, each computed once a grid.

    Every block finds them made: `prepare` is called where positions are, before the blocks and outside of what is
    compiled.
    """

    def __init__(self, windows: Sequence[AnyWindow], mesh: DeviceMesh):
        self.windows = list(dict.fromkeys(windows))
        self.mesh, self.rank, self.size = mesh, mesh.get_local_rank(), mesh.size()
        self.deals: dict[tuple[AnyWindow, Window], Deal] = {}
        self.moves: dict[tuple[AnyWindow, AnyWindow, Window], Move] = {}

    def prepare(self, grid: Window, device: torch.device) -> None:
        """Raises LayoutError where a window of the model cannot be whole on this grid."""
        distinct = self.distinct(grid)
        made = self.deals.get((distinct[0], grid))
        if made is not None and made.tokens.device == device:
            return
        faults = list(dealing_faults(distinct, grid, self.size))
        if faults:
            raise LayoutError(faults)
        with torch.inference_mode(False):  # made while sampling, used in training
            for window in distinct:
                self.deals[window, grid] = _deal(window, grid, self.rank, self.size, device)
                for other in (w for w in distinct if w != window):
                    self.moves[other, window, grid] = _move(other, window, grid, self.rank, self.size, device)

    def distinct(self, grid: Window) -> list[AnyWindow]:
        """The windows of the model on a grid, without those that are the same there."""
        return list(dict.fromkeys(whole_window(window, grid) for window in self.windows))

    def deal(self, window: AnyWindow, grid: Window) -> Deal:
        return self.deals[whole_window(window, grid), grid]

    def move(self, before: AnyWindow, after: AnyWindow, grid: Window) -> Move | None:
        """None where tokens stay."""
        old, new = whole_window(before, grid), whole_window(after, grid)
        return None if old == new else self.moves[old, new, grid]


def _dealt(window: AnyWindow, grid: Window, ranks: int) -> tuple[Tensor, Tensor, list[int]]:
    """(the clip's tokens in the order of windows, the place of each among all entries of windows, tokens a rank)."""
    windows, places = _numbered(window, grid)
    entry = windows * entries(window, grid) + places
    order = entry.argsort()
    sizes = window_tokens(window, grid)
    return order, entry[order], [sum(sizes[first:last]) for first, last in runs(sizes, ranks)]


def _numbered(window: AnyWindow, grid: Window) -> tuple[Tensor, Tensor]:
    """(window of each token of the clip, its place there)."""
    if len(window) == 2:
        kind, k = window
        number = torch.arange(grid[0] * grid[1] * grid[2])
        places = number // k if kind == "single" else number // (k * k) * k + number % k
        return skipped_to(number, window), places
    windows, places = torch.zeros((), dtype=torch.long), torch.zeros((), dtype=torch.long)
    axes = torch.meshgrid(*(torch.arange(axis) for axis in grid), indexing="ij")
    for index, size, axis in zip(axes, window, grid, strict=True):
        windows, places = windows * -(-axis // size) + index // size, places * size + index % size
    return windows.flatten(), places.flatten()


def _part(x: Tensor, counts: Sequence[int], rank: int) -> Tensor:
    start = sum(counts[:rank])
    return x[start : start + counts[rank]]


def _deal(window: AnyWindow, grid: Window, rank: int, ranks: int, device: torch.device) -> Deal:
    order, entry, counts = _dealt(window, grid, ranks)
    first, last = runs(window_tokens(window, grid), ranks)[rank]
    entries_each = entries(window, grid)
    places = _part(entry, counts, rank) - first * entries_each
    padded = torch.cat([pad_to(_part(order, counts, r), 0, max(counts)) for r in range(ranks)])
    starts = torch.arange(ranks).repeat_interleave(torch.tensor(counts)) * max(counts)
    within = torch.cat([torch.arange(count) for count in counts])
    back = torch.empty_like(order)
    back[order] = starts + within
    full = len(places) == (last - first) * entries_each
    return Deal(
        tuple(counts), slice(first, last), _part(order, counts, rank).to(device), padded.to(device),
        back.to(device), None if full else places.to(device),
    )  # fmt: skip


def _move(before: AnyWindow, after: AnyWindow, grid: Window, rank: int, ranks: int, device: torch.device) -> Move:
    old, _, old_counts = _dealt(before, grid, ranks)
    new, _, new_counts = _dealt(after, grid, ranks)
    old_owner, new_owner = (torch.tensor(owners(window, grid, ranks)) for window in (before, after))
    mine = _part(old, old_counts, rank)
    leaving = new_owner[mine].argsort(stable=True)
    # Every sender keeps the order of its own deal: tokens arrive in the order of senders, then of the old deal.
    incoming = old[new_owner[old] == rank]
    place = torch.empty_like(old)
    place[incoming] = torch.arange(len(incoming))
    arriving = place[_part(new, new_counts, rank)]
    send = torch.bincount(new_owner[mine], minlength=ranks).tolist()
    receive = torch.bincount(old_owner[incoming], minlength=ranks).tolist()
    return Move(tuple(send), tuple(receive), leaving.to(device), arriving.to(device))


class DealCut:
    """A forward hook: outputs that hold one entry a token become this rank's, as the first block wants them.

    The grid is among the arguments of the module, or of the one around it, whose pre-hook is `count`.
    """

    def __init__(self, dims: Mapping[int, int], deals: Deals, window: AnyWindow):
        self.dims, self.deals, self.window = dims, deals, window
        self.around: tuple[Any, ...] = ()

    def count(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.around = tuple(arg for arg in args if not isinstance(arg, Tensor))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        grid = grid_of((*args, *self.around)).shape
        first = output if isinstance(output, Tensor) else output[min(self.dims)]
        self.deals.prepare(grid, first.device)
        return each(output, self.dims, lambda x, dim: self._own(x, dim, grid))

    def _own(self, x: Tensor, dim: int, grid: Window) -> Tensor:
        found = self.deals.deal(self.window, grid)
        own = split(x.index_select(dim, found.padded), dim, self.deals.mesh)
        return own.narrow(dim, 0, found.counts[self.deals.rank])


class PositionsCut(DealCut):
    """The same for what says where tokens are: cut for every deal of the model, one after another, no gradient."""

    def _own(self, x: Tensor, dim: int, grid: Window) -> Tensor:
        parts = [x.index_select(dim, self.deals.deal(w, grid).tokens) for w in self.deals.distinct(grid)]
        return torch.cat(parts, dim)


class Switch:
    """A forward pre-hook of a block: tokens go from the deal of the block before to that of this one.

    Args:
        before: window of the block before; None for the first of the model.
        positions: number of the argument, where there are so many, that holds what `PositionsCut` made, and the dims
            that it cut.
    """

    def __init__(
        self, before: AnyWindow | None, window: AnyWindow, deals: Deals, positions: Mapping[int, Mapping[int, int]]
    ):
        self.before, self.window, self.deals, self.positions = before, window, deals, positions

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        grid = grid_of(args).shape
        given = list(args)
        move = None if self.before is None else self.deals.move(self.before, self.window, grid)
        if move is not None:
            given[0] = moved(given[0], move, self.deals.mesh)
        own = self.deals.deal(self.window, grid).counts[self.deals.rank]
        for argument, dims in ((a, dims) for a, dims in self.positions.items() if a < len(given)):
            start = self._start(grid)
            given[argument] = each(given[argument], dims, lambda x, dim, start=start: x.narrow(dim, start, own))
        return tuple(given)

    def _start(self, grid: Window) -> int:
        """Where this block's deal begins in what `PositionsCut` made."""
        distinct = self.deals.distinct(grid)
        counts = [self.deals.deal(window, grid).counts[self.deals.rank] for window in distinct]
        return [0, *accumulate(counts)][distinct.index(whole_window(self.window, grid))]


def moved(x_BsD: Tensor, move: Move, mesh: DeviceMesh) -> Tensor:
    """This rank's tokens in one deal -> its tokens in another: one all-to-all of real tokens."""
    leaving = x_BsD.transpose(0, 1).index_select(0, move.leaving)
    return deal(leaving, move.send, move.receive, mesh).transpose(0, 1).index_select(1, move.arriving)


class DealWhole:
    """A forward hook that gathers the tokens of the last block's deal, and a pre-hook that is told the grid."""

    def __init__(self, dim: int, deals: Deals, window: AnyWindow):
        self.dim, self.deals, self.window = dim, deals, window
        self.grid: Window | None = None

    def count(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.grid = grid_of(args).shape

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        assert self.grid is not None, "the module around a gather is called first, with the grid"
        found = self.deals.deal(self.window, self.grid)
        padded = pad_to(output, self.dim, max(found.counts))
        return gather(padded, self.dim, self.deals.mesh).index_select(self.dim, found.back)


class DealtCore(nn.Module):
    """A core on the tokens of this rank's windows: (B, s, N, K) in and out, s the rank's count."""

    def __init__(self, inner: nn.Module, window: AnyWindow, deals: Deals):
        super().__init__()
        self.inner, self.window, self.deals = inner, window, deals

    def forward(
        self, q_BsNK: Tensor, k_BsNK: Tensor, v_BsNK: Tensor, grid: Any, bias: Any = None, text: Any = None
    ) -> Tensor:
        found = self.deals.deal(self.window, grid.shape)
        size = entries(self.window, grid.shape)
        windows = found.windows.stop - found.windows.start
        inner: Any = self.inner
        q, k, v = (to_windows(x, found.places, windows, size) for x in (q_BsNK, k_BsNK, v_BsNK))
        return from_windows(inner.within(q, k, v, grid, bias, text, found.windows), found.places, windows)


def to_windows(x_BsNK: Tensor, places: Tensor | None, windows: int, size: int) -> Tensor:
    """(B, s, N, K) -> (B * windows, W, N, K), zeros where a window has no token."""
    if places is not None:
        empty = x_BsNK.new_zeros(x_BsNK.shape[0], windows * size, *x_BsNK.shape[2:])
        x_BsNK = empty.index_copy(1, places, x_BsNK)
    return x_BsNK.reshape(-1, size, *x_BsNK.shape[2:])


def from_windows(x_XWNK: Tensor, places: Tensor | None, windows: int) -> Tensor:
    """The inverse of `to_windows`, what is no token dropped."""
    x_BsNK = x_XWNK.reshape(x_XWNK.shape[0] // windows, -1, *x_XWNK.shape[2:])
    return x_BsNK if places is None else x_BsNK.index_select(1, places)


def each(output: Any, dims: Mapping[int, int], change: Any) -> Any:
    """A tensor or a tuple with `change(x, dim)` in place of the chosen outputs; named tuples stay what they are."""
    if isinstance(output, Tensor):
        return change(output, dims[0])
    parts = [change(x, dims[i]) if i in dims else x for i, x in enumerate(output)]
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
