"""Tensor parallelism from outside: a plan over parameter names is applied to a module whose code does not change.

Megatron-LM (1909.08053, section 3): the first linear layers of a region are divided by columns, the last by
rows; inside the region each rank works on its share of the heads or of the hidden width, and the partial
results are summed once, on leaving it.

| kind      | on each rank                                        | its gradient                       |
|-----------|-----------------------------------------------------|------------------------------------|
| column    | a block of dim 0 (output rows, or heads of a table) | of its own part                    |
| row       | a block of dim 1; a bias whole, counted once        | of its own part; the bias's whole  |
| per_head  | whole, used on the rank's own heads (QK-norm)       | summed over ranks                  |
| replicate | whole, and the same work on every rank (AdaLN)      | the same on every rank             |

Every parameter becomes a DTensor, so checkpoints, FSDP2 and the gradient norm know the full tensor, but
the arithmetic runs on plain local tensors with functional collectives: DTensor arithmetic adds a dispatch to every
operation, and leaves the gradient of QK-norm's scale Partial for somebody else to sum.
On torch 2.13 a block with DTensor parameters goes through activation checkpointing or through compile, not through
both together (AOTAutograd's `save_from_forward`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.utils._pytree import tree_map

from parallel.collectives import enter_tensor, first_only, group_name, leave_tensor
from parallel.layout import divisors, words
from parallel.names import PlanError, match, modules

Kind = Literal["column", "row", "per_head", "replicate"]


def apply_tensor(
    module: nn.Module,
    parameters: Mapping[str, Kind],
    regions: Mapping[str, tuple[int, ...]],
    mesh: DeviceMesh,
    num_heads: int,
    means: Sequence[str] = (),
) -> None:
    """Divide `module` (on meta, or with the same values on every rank) over the one dim of `mesh`, in place.

    Args:
        parameters: name pattern -> kind, for every parameter of `module`.
        regions: pattern of a module -> which of its positional arguments the region's ranks share the work on.
        num_heads: attention heads in all, which the ranks divide.
        means: patterns of modules inside regions whose output is a mean over what the ranks divide equally.

    Raises PlanError where the plan does not fit the names, and ValueError where a size does not divide.
    """
    size = mesh.size()
    if num_heads % size:
        raise ValueError(
            f"{num_heads} heads are not divisible by parallel.tensor={size}; use one of {words(divisors(num_heads))}"
        )
    names = [name for name, _ in module.named_parameters()]
    kinds = match(parameters, names, "parameter")
    entrances = match(regions, modules(module, regions), "module")
    for name, kind in kinds.items():
        _check(name, module.get_parameter(name), kind, size)
    owners: dict[str, dict[str, Kind]] = {}
    for name, kind in kinds.items():
        owner, _, own_name = name.rpartition(".")
        owners.setdefault(owner, {})[own_name] = kind
    for owner, own in owners.items():
        _divide(module.get_submodule(owner), own, mesh)
    for name, arguments in entrances.items():
        module.get_submodule(name).register_forward_pre_hook(Entrance(arguments, group_name(mesh)))
    for averaging in modules(module, means).values():
        averaging.register_forward_hook(Averaged(group_name(mesh), size))


def _check(name: str, parameter: Tensor, kind: Kind, size: int) -> None:
    if kind not in ("column", "row", "per_head", "replicate"):
        raise PlanError(f"parameter {name} has kind {kind!r}; use one of column row per_head replicate")
    if kind == "column" or (kind == "row" and parameter.ndim > 1):
        dim = 0 if kind == "column" else 1
        if parameter.shape[dim] % size:
            raise ValueError(
                f"{kind} parameter {name} has {parameter.shape[dim]} entries in dim {dim}, not divisible by "
                f"parallel.tensor={size}; use one of {words(divisors(parameter.shape[dim]))}"
            )


def _placement(parameter: Tensor, kind: Kind) -> Placement:
    if kind == "column":
        return Shard(0)
    return Shard(1) if kind == "row" and parameter.ndim > 1 else Replicate()


def _divide(module: nn.Module, kinds: Mapping[str, Kind], mesh: DeviceMesh) -> None:
    """Turn the module's own parameters into DTensors, which its forward reads as local tensors."""
    group, first = group_name(mesh), mesh.get_local_rank() == 0
    for name, kind in kinds.items():
        parameter = module.get_parameter(name)
        placement = [_placement(parameter, kind)]
        # No source rank: every rank cuts its part from its own copy, and a meta tensor stays one.
        divided = distribute_tensor(parameter.detach(), mesh, placement, src_data_rank=None)
        module._parameters[name] = nn.Parameter(divided, requires_grad=parameter.requires_grad)
    module.__class__ = _reading_locally(type(module), kinds, group, first)
    if "row" in kinds.values():
        module.register_forward_hook(Exit(group))


def _reading_locally(cls: type[nn.Module], kinds: Mapping[str, Kind], group: str, first: bool) -> type[nn.Module]:
    """A class for one instance: in its forward, `self.<name>` is the local tensor with the gradient of its kind.

    The DTensor stays in `_parameters`, where names, state dicts and FSDP2 find it, and outside of the forward
    `self.<name>` is that.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.inside_forward = True
        try:
            return cls.forward(self, *args, **kwargs)
        finally:
            self.inside_forward = False

    def reader(name: str, kind: Kind) -> property:
        def read(self: Any) -> Tensor | None:
            parameter: Tensor | None = self._parameters[name]
            return _local(parameter, kind, group, first) if self.inside_forward else parameter

        return property(read)

    members: dict[str, Any] = {name: reader(name, kind) for name, kind in kinds.items()}
    members |= {"forward": forward, "inside_forward": False, "__module__": cls.__module__}
    return type(cls.__name__, (cls,), members)


def read_summed(module: nn.Module, group: str) -> None:
    """Let the module's own parameters, whole on every rank, get the sum over ranks for a gradient (kind per_head)."""
    kinds: dict[str, Kind] = dict.fromkeys((name for name, _ in module.named_parameters(recurse=False)), "per_head")
    module.__class__ = _reading_locally(type(module), kinds, group, first=False)


def _local(parameter: Tensor | None, kind: Kind, group: str, first: bool) -> Tensor | None:
    if parameter is None:
        return None
    local = cast(DTensor, parameter).to_local()
    if kind == "per_head":
        return enter_tensor(local, group)
    return first_only(local, first) if kind == "row" and local.ndim == 1 else local


class Entrance:
    """A forward pre-hook: the chosen arguments (tensors, or tuples of them) enter the region.

    `tokens` takes the place of that for argument 0: (x, all arguments) -> x (`parallel/sharded_norms.py`).
    """

    def __init__(self, arguments: tuple[int, ...], group: str):
        self.arguments, self.group = arguments, group
        self.tokens: Callable[[Tensor, tuple[Any, ...]], Tensor] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if max(self.arguments) >= len(args):
            raise PlanError(
                f"{type(module).__name__} got {len(args)} positional arguments, but the plan lets argument "
                f"{max(self.arguments)} enter its tensor region; correct the plan or the call"
            )
        entered = [tree_map(self._enter, a) if i in self.arguments else a for i, a in enumerate(args)]
        if self.tokens is not None:
            entered[0] = self.tokens(args[0], args)
        return tuple(entered)

    def _enter(self, x: Any) -> Any:
        return enter_tensor(x, self.group) if isinstance(x, Tensor) and x.is_floating_point() else x


class Averaged:
    """A forward hook: the mean of the ranks' means. Each rank uses it, so its gradient is the sum of theirs."""

    def __init__(self, group: str, size: int):
        self.group, self.size = group, size

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return enter_tensor(leave_tensor(output / self.size, self.group), self.group)


class Exit:
    """A forward hook: the sum of the ranks' partial outputs, or what `tokens` makes of them."""

    def __init__(self, group: str):
        self.group = group
        self.tokens: Callable[[Tensor], Tensor] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return leave_tensor(output, self.group) if self.tokens is None else self.tokens(output)
