"""Context parallelism of a causal 3D autoencoder, from outside: each rank has some of the frames of the same video.

A module that maps (B, C, T, H, W) to (B, C', T', H', W') gets and gives the whole on every rank; in between each
rank holds its part of the time, or of the rows. Pointwise layers do not notice. Of the others

| divided over | what is changed           | how                                                            |
|--------------|---------------------------|----------------------------------------------------------------|
| time         | what treats a first frame | later ranks: the previous rank's last frames in front, no drop |
| rows         | convolutions wider than 1 | padding is the neighbours' rows, zeros at the picture's edges  |

Both can be applied to one module, each on its own mesh. The gradient rule is that of `parallel/sequence.py`: every
parameter's gradient is the mean over the ranks. A video of one frame is not divided over time: every rank does all
of it, which gives the same mean.

What time expects of the modules that treat the first frame: a front is called as (x) and gives the frames to go in
front of x; `past` says how many it takes of what came before where x does not start the video. A drop is called as
(x) and drops `count` frames. A front sees 1 frame, and a drop 1 + `count`, of a video of one frame only, because a
part has at least 2 latent frames. So nothing is remembered between calls, and a backward pass may run a
forward anew in any order.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from parallel.collectives import gather, split
from parallel.halo import halo
from parallel.layout import refuse
from parallel.names import PlanError, modules
from parallel.parts import Over, Parts

DIM = {"time": 2, "rows": 3}
Strides = Mapping[str, tuple[int, int]]


class Plan(Protocol):
    """Where an autoencoder is divided, as patterns of names (`parallel/names.py`).

    fronts: modules that give the frames in front of a part.
    drops: modules that drop frames where the video starts.
    convolutions: those that look at neighbouring rows.
    time, rows: module -> (frames or rows for each latent one) of its input and of its output.
    """

    @property
    def fronts(self) -> Sequence[str]: ...
    @property
    def drops(self) -> Sequence[str]: ...
    @property
    def convolutions(self) -> Sequence[str]: ...
    @property
    def time(self) -> Strides: ...
    @property
    def rows(self) -> Strides: ...


def apply_context(module: nn.Module, plan: Plan, mesh: DeviceMesh, over: Over = "time") -> None:
    """Divide the work of `module` over the one dim of `mesh`, in place. Names of parameters stay.

    Raises PlanError where a pattern fits no module, or a module is not what its place in the plan says. A call
    raises LayoutError where the ranks cannot divide the video (`parallel.parts.context_faults`, `row_faults`).
    """
    if over == "time":
        _replace(module, plan.fronts, "past", _Front, mesh)
        _replace(module, plan.drops, "count", _Drop, mesh)
    else:
        for name, found in modules(module, plan.convolutions).items():
            _require(name, found, "kernel_size", "stride", "padding")
            _give_rows(cast(nn.Conv3d, found), mesh)
    strides = plan.time if over == "time" else plan.rows
    for pattern, (inside, outside) in strides.items():
        for found in modules(module, [pattern]).values():
            found.forward = _Divided(found.forward, mesh, over, inside, outside)


def _replace(
    module: nn.Module,
    patterns: Sequence[str],
    attribute: str,
    wrap: Callable[[nn.Module, DeviceMesh], nn.Module],
    mesh: DeviceMesh,
) -> None:
    for name, found in modules(module, patterns).items():
        _require(name, found, attribute)
        owner, _, own_name = name.rpartition(".")
        setattr(module.get_submodule(owner), own_name, wrap(found, mesh))


def _require(name: str, module: nn.Module, *attributes: str) -> None:
    absent = [a for a in attributes if not hasattr(module, a)]
    if absent:
        raise PlanError(
            f"{name} is a {type(module).__name__} without {' and '.join(absent)}, which its place in the plan needs; "
            "correct the pattern"
        )


class _Divided:
    """Takes the place of a forward: cut, call, make whole. x and the result are the same on every rank."""

    def __init__(self, forward: Callable[[Tensor], Tensor], mesh: DeviceMesh, over: Over, inside: int, outside: int):
        self.forward, self.mesh, self.over = forward, mesh, over
        self.inside, self.outside = inside, outside

    def __call__(self, x: Tensor) -> Tensor:
        parts = Parts(self.over, x.shape[DIM[self.over]], self.inside, self.mesh.size())
        if self.over == "time" and parts.latent == 1:
            return self.forward(x)
        refuse(parts.faults())
        return whole(self.forward(own_part(x, parts, self.mesh)), parts.scaled(self.outside), self.mesh)


def own_part(x: Tensor, parts: Parts, mesh: DeviceMesh) -> Tensor:
    """This rank's part of the whole x. Backward: the whole gradient, divided by n."""
    dim = DIM[parts.over]
    padded = _pad(x, dim, parts.missing, parts.padding)
    own = split(padded, dim, mesh)
    return own.narrow(dim, parts.missing, parts.own - parts.missing) if mesh.get_local_rank() == 0 else own


def whole(own: Tensor, parts: Parts, mesh: DeviceMesh) -> Tensor:
    """All of a dim from the ranks' parts. Backward: this rank's part of the gradients' sum."""
    dim = DIM[parts.over]
    if mesh.get_local_rank() == 0:
        own = _pad(own, dim, parts.missing, 0)
    return gather(own, dim, mesh).narrow(dim, parts.missing, parts.length)


def _pad(x: Tensor, dim: int, front: int, back: int) -> Tensor:
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (front, back)) if front or back else x


class _Front(nn.Module):
    """The frames in front of x: those of `inner` on the first rank, on the others the previous rank's last ones."""

    def __init__(self, inner: nn.Module, mesh: DeviceMesh):
        super().__init__()
        self.inner, self.mesh, self.past = inner, mesh, int(cast(Any, inner).past)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] == 1:
            return cast(Tensor, self.inner(x))
        front = halo(x, 2, self.past, 0, self.mesh).front if self.past else x[:, :, :0]
        return torch.cat((front, self.inner(x)), dim=2) if self.mesh.get_local_rank() == 0 else front


class _Drop(nn.Module):
    """What `inner` does on the first rank; the others keep all frames."""

    def __init__(self, inner: nn.Module, mesh: DeviceMesh):
        super().__init__()
        self.inner, self.mesh, self.count = inner, mesh, int(cast(Any, inner).count)

    def forward(self, x: Tensor) -> Tensor:
        starts = self.mesh.get_local_rank() == 0 or x.shape[2] == 1 + self.count
        return cast(Tensor, self.inner(x)) if starts else x


def _give_rows(convolution: nn.Conv3d, mesh: DeviceMesh) -> None:
    """Rows of the neighbours in place of the convolution's own padding of dim 3."""
    padding = cast(tuple[int, int, int], convolution.padding)
    before = padding[1]
    after = convolution.kernel_size[1] - before - convolution.stride[1]
    convolution.padding = (padding[0], 0, padding[2])
    convolution.register_forward_pre_hook(_Rows(before, after, mesh))


class _Rows:
    """A forward pre-hook: the argument with `before` rows above it and `after` below."""

    def __init__(self, before: int, after: int, mesh: DeviceMesh):
        self.before, self.after, self.mesh = before, after, mesh

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Tensor:
        (x,) = args
        above, below = halo(x, 3, self.before, self.after, self.mesh)
        zero = torch.zeros_like(x[:, :, :, :1])
        zeros_above = [zero] * (self.before - above.shape[3])
        zeros_below = [zero] * (self.after - below.shape[3])
        return torch.cat((*zeros_above, above, x, below, *zeros_below), dim=3)
