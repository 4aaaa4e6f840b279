"""Sequence parallelism from outside: each rank holds a share of the video tokens of the same rows.

The tokens are cut after the modules that make them and gathered before they are read as a whole; what lies between
works token by token except the cores, each of which gets a module around it that moves tokens. Names of parameters
stay, because a core has none. The kinds, and when which is better, stand in `kinds.py`.

The gradient rule: `split` returns the mean of what the ranks send back, `gather` their sum (of n equal
gradients), so between them activation gradients are n times the true ones, and every parameter's gradient, inside
and outside, is the mean over the ranks. Averaging over data x sequence is therefore all that is left to do.

What the seams expect of a module that takes part: a core is called as (q_BSNK, k_BSNK, v_BSNK, grid, bias, text),
where `grid.shape` and `grid.num_tokens` are those of the whole row, `bias` has heads in dim 0, and `text` is a tuple
of keys and values, heads in dim 2, and what else the core needs of them. More is asked of a core by
`RingCore` and by `DealtCore`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from parallel.collectives import gather, split
from parallel.dealing import AnyWindow
from parallel.kinds import SequenceKind
from parallel.mesh import Mesh
from parallel.names import PlanError, modules
from parallel.shares import num_tokens, pad_to, share
from parallel.ulysses import UlyssesCore
from parallel.window import DealCut, Deals, DealtCore, DealWhole, PositionsCut, Switch, each


class Seams(Protocol):
    """Where tokens of a module begin, mix and end, by patterns of names; only modules that are there are named.

    split: pattern -> {output: dim}; these outputs of the module are cut in that dim (output 0 is the only one of a
        module that returns a tensor). The kind window asks for the grid among its arguments, or among those of the
        module around it.
    gather: pattern -> dim in which its output is made whole.
    counted: the module around `gather` whose arguments hold the grid; not read without a `gather`.
    cores: patterns of the modules that mix tokens.
    windows: name -> attention window of every block of the whole model, in order, also of those that other pipeline
        stages have. A core belongs to the block that its name begins with.
    positions: pattern among `split` -> argument of a block, and of `counted` where that takes them, that holds its
        outputs, which have no gradient.
    """

    @property
    def split(self) -> Mapping[str, Mapping[int, int]]: ...
    @property
    def gather(self) -> Mapping[str, int]: ...
    @property
    def counted(self) -> str: ...
    @property
    def cores(self) -> Sequence[str]: ...
    @property
    def windows(self) -> Mapping[str, AnyWindow]: ...
    @property
    def positions(self) -> Mapping[str, int]: ...


def apply_sequence(module: nn.Module, seams: Seams, mesh: Mesh, kind: SequenceKind) -> None:
    """Divide the tokens of `module` over `mesh.sequence`, in place; ulysses_ring uses `mesh.ring` x `mesh.ulysses`.

    `kinds.sequence_faults` says beforehand what does not fit. Raises PlanError where a pattern fits no module.
    """
    if kind == "window":
        _deal_windows(module, seams, mesh.sequence)
        return
    _cut_evenly(module, seams, mesh, kind)


def _around(core: nn.Module, mesh: Mesh, kind: SequenceKind) -> nn.Module:
    """What takes the place of a core where every rank has equally many tokens."""
    if kind == "ulysses":
        return UlyssesCore(core, mesh.sequence)
    from parallel.ring import RingCore  # brings torch's compiler: a second, which other kinds need not wait

    if kind == "ring":
        return RingCore(core, mesh.sequence)
    assert kind == "ulysses_ring", kind
    assert mesh.ring is not None, "ulysses_ring takes a mesh that was built with its degree of ulysses"
    assert mesh.ulysses is not None
    return UlyssesCore(RingCore(core, mesh.ring), mesh.ulysses)


def _cut_evenly(module: nn.Module, seams: Seams, mesh: Mesh, kind: SequenceKind) -> None:
    """Every rank gets ceil(S / n) tokens, in the order of the clip."""
    for pattern, dims in seams.split.items():
        for found in modules(module, [pattern]).values():
            found.register_forward_hook(_Cut(dims, mesh.sequence))
    for pattern, dim in seams.gather.items():
        _make_whole(module, pattern, seams.counted, _Whole(dim, mesh.sequence))
    for name, core in modules(module, seams.cores).items():
        _replace(module, name, _around(core, mesh, kind))


def _deal_windows(module: nn.Module, seams: Seams, mesh: DeviceMesh) -> None:
    """Every rank gets whole windows, other ones where the next block's differ."""
    windows = list(seams.windows.values())
    deals = Deals(windows, mesh)
    for pattern, dims in seams.split.items():
        kind = PositionsCut if pattern in seams.positions else DealCut
        for name, found in modules(module, [pattern]).items():
            cut = kind(dims, deals, windows[0])
            found.register_forward_hook(cut)
            if owner := name.rpartition(".")[0]:
                module.get_submodule(owner).register_forward_pre_hook(cut.count)
    held = {argument: seams.split[pattern] for pattern, argument in seams.positions.items()}
    here = dict(module.named_modules())
    for (name, window), before in zip(seams.windows.items(), [None, *windows], strict=False):
        if name in here:
            here[name].register_forward_pre_hook(Switch(before, window, deals, held))
    for pattern, dim in seams.gather.items():
        _make_whole(module, pattern, seams.counted, DealWhole(dim, deals, windows[-1]))
        for found in modules(module, [seams.counted]).values():
            found.register_forward_pre_hook(Switch(None, windows[-1], deals, held))
    cut_by: dict[Any, Any] = {}
    for name, core in modules(module, seams.cores).items():
        found_windows = [w for block, w in seams.windows.items() if name.startswith(f"{block}.")]
        if len(found_windows) != 1:
            raise PlanError(
                f"core {name} lies in {len(found_windows)} of {len(windows)} blocks with a window; it must lie in 1"
            )
        block = next(block for block in seams.windows if name.startswith(f"{block}."))
        own: Any = getattr(core, "window", None)
        if cut_by.setdefault(block, own) != own:
            raise PlanError(
                f"{block} mixes tokens in windows of {cut_by[block]} and of {own}, and 1 rank holds 1 kind of them "
                "whole; use parallel.sequence_kind=ulysses, ring or ulysses_ring"
            )
        _replace(module, name, DealtCore(core, found_windows[0], deals))


def _make_whole(module: nn.Module, pattern: str, counted: str, whole: Any) -> None:
    for found in modules(module, [pattern]).values():
        found.register_forward_hook(whole)
    for found in modules(module, [counted]).values():
        found.register_forward_pre_hook(whole.count)


def _replace(module: nn.Module, name: str, new: nn.Module) -> None:
    owner, _, own_name = name.rpartition(".")
    setattr(module.get_submodule(owner), own_name, new)


class _Cut:
    """A forward hook: the outputs' shares of this rank."""

    def __init__(self, dims: Mapping[int, int], mesh: DeviceMesh):
        self.dims, self.mesh = dims, mesh

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return each(output, self.dims, self._own)

    def _own(self, x: Tensor, dim: int) -> Tensor:
        size = self.mesh.size()
        return split(pad_to(x, dim, share(x.shape[dim], size) * size), dim, self.mesh)


class _Whole:
    """A forward hook that gathers and trims, and a pre-hook that is told the number of tokens."""

    def __init__(self, dim: int, mesh: DeviceMesh):
        self.dim, self.mesh, self.tokens = dim, mesh, 0

    def count(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.tokens = num_tokens(args)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return gather(output, self.dim, self.mesh).narrow(self.dim, 0, self.tokens)
