"""What a step sends: calls and bytes of every collective, by mesh axis and kind, in the forward and backward pass.

    with count_communication(mesh) as counted:
        step()
    counted.as_dict()

A TorchDispatchMode sees the operators under both interfaces, `torch.distributed` (FSDP2, pipelines, our buckets)
and the functional collectives, on any device and in the threads of the backward pass. Every operation then passes
Python, and compiled blocks run eagerly, so it is for a step now and then and not for all.

Bytes are what each rank must send on an ideal ring of n ranks; what stays on the rank is not counted:

| kind                | bytes                                                                        |
|---------------------|------------------------------------------------------------------------------|
| all_gather          | (n - 1) / n of the gathered tensor                                           |
| reduce_scatter      | (n - 1) / n of the tensor that is reduced                                    |
| all_reduce          | both: 2 (n - 1) / n of the tensor                                            |
| all_to_all          | this rank's input without the part for itself, uneven parts as they are      |
| broadcast           | (n - 1) / n of the tensor, the mean over ranks                               |
| reduce, gather      | (n - 1) / n of what a rank puts in, the mean over ranks                      |
| scatter             | (n - 1) / n of what a rank gets, the mean over ranks                         |
| send                | the tensor                                                                   |
| recv, barrier       | 0                                                                            |

An operator that is not known here is counted under its own name with 0 bytes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.mesh import Mesh

Group = tuple[str, int, int]  # name, number of ranks, this rank in it


@dataclass
class Count:
    calls: int = 0
    bytes: float = 0.0


@dataclass
class Communication:
    """(axis, kind, phase) -> calls and bytes of this rank; phase is `forward` or `backward`.

    An axis that the mesh does not name is called by its ranks, as in `ranks 0 1`.
    """

    counts: dict[tuple[str, str, str], Count] = field(default_factory=dict)

    def add(self, axis: str, kind: str, phase: str, num_bytes: float) -> None:
        count = self.counts.setdefault((axis, kind, phase), Count())
        count.calls += 1
        count.bytes += num_bytes

    def bytes(self, axis: str | None = None, kind: str | None = None, phase: str | None = None) -> float:
        """Sum over whatever is not given."""
        return sum(count.bytes for count in self._chosen(axis, kind, phase))

    def calls(self, axis: str | None = None, kind: str | None = None, phase: str | None = None) -> int:
        """Sum over whatever is not given."""
        return sum(count.calls for count in self._chosen(axis, kind, phase))

    def _chosen(self, *wanted: str | None) -> Iterator[Count]:
        for key, count in self.counts.items():
            if all(w is None or w == k for w, k in zip(wanted, key, strict=True)):
                yield count

    def as_dict(self) -> dict[str, Any]:
        """{axis: {kind: {phase: {"calls", "bytes"}}}}, for JSON."""
        told: dict[str, Any] = {}
        for (axis, kind, phase), count in sorted(self.counts.items()):
            kinds = told.setdefault(axis, {}).setdefault(kind, {})
            kinds[phase] = {"calls": count.calls, "bytes": round(count.bytes)}
        return told


@contextmanager
def count_communication(
    axes: Mesh | Mapping[str, DeviceMesh], into: Communication | None = None
) -> Iterator[Communication]:
    """Count what this rank sends while entered, added to what `into` holds.

    `axes`: the meshes by name, each dim of one under `name.dim`.
    """
    counted = Communication() if into is None else into
    with _Counting(axis_names(axes), counted):
        yield counted


def axis_names(axes: Mesh | Mapping[str, DeviceMesh]) -> dict[str, str]:
    """Name of a process group -> axis. Of a `Mesh`: its root's axes and `sequence`, a factor of `zero`.

    Axes of the same ranks may have one group, which is then called by both (`zero+sequence` where shard is 1).
    """
    if isinstance(axes, Mesh):
        root = axes.root
        named = {name: root[name] for name in root.mesh_dim_names or ()}
        named["sequence"] = axes.sequence
    else:
        named = dict(axes)
    names: dict[str, str] = {}
    for name, mesh in named.items():
        for dim in range(mesh.ndim):
            suffix = f".{(mesh.mesh_dim_names or range(mesh.ndim))[dim]}" if mesh.ndim > 1 else ""
            group = mesh.get_group(dim).group_name
            names[group] = f"{names[group]}+{name}{suffix}" if group in names else name + suffix
    return names


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, names: Mapping[str, str], counted: Communication):
        super().__init__()  # type: ignore[no-untyped-call]
        self.names, self.counted = dict(names), counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its own collectives come here next
        kwargs = kwargs or {}
        if getattr(func, "namespace", "") in ("c10d", "_c10d_functional"):
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
            if not given.keys().isdisjoint(("process_group", "group_name")):  # waiting and wrapping name no group
                self._count(func._schema.name.partition("::")[2], given)
        return func(*args, **kwargs)

    def _count(self, name: str, given: Mapping[str, Any]) -> None:
        group = _group_of(given)
        axis = self.names.get(group[0])
        if axis is None:
            ranks = dist.get_process_group_ranks(_resolve(group[0]))
            axis = self.names[group[0]] = "ranks " + " ".join(str(rank) for rank in ranks)
        phase = "backward" if torch._C._current_graph_task_id() != -1 else "forward"
        kind, sent = _RULES.get(name, (name, _nothing))
        self.counted.add(axis, kind, phase, sent(given, group))


def _group_of(given: Mapping[str, Any]) -> Group:
    """Of the arguments of an operator: the functional ones name their group, the others hold it."""
    if "process_group" in given:
        group = dist.ProcessGroup.unbox(given["process_group"])
    else:
        named = given["group_name"]
        group = _resolve(named) if isinstance(named, str) else dist.ProcessGroup.unbox(named)
    return group.group_name, group.size(), group.rank()


def _resolve(name: str) -> dist.ProcessGroup:
    return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def _size(x: Any) -> int:
    """Bytes of a tensor, or of all tensors in nested lists."""
    if isinstance(x, Tensor):
        return x.numel() * x.element_size()
    return sum(_size(part) for part in x)


def _of(*names: str) -> Callable[[Mapping[str, Any]], int]:
    """Bytes of the first of these arguments that there is."""

    def size(given: Mapping[str, Any]) -> int:
        return _size(next(given[name] for name in names if name in given))

    return size


Rule = Callable[[Mapping[str, Any], Group], float]
_INPUTS = ("input", "inputs", "input_tensor", "input_list", "input_tensors", "tensors", "tensor")


def _ring(times: float, *names: str) -> Rule:
    """`times` (n - 1) / n of the whole tensor."""
    size = _of(*(names or _INPUTS))
    return lambda given, group: times * (group[1] - 1) / group[1] * size(given)


def _gathered(given: Mapping[str, Any], group: Group) -> float:
    """From the own part, of which every other rank gets a copy."""
    return (group[1] - 1) * _of(*_INPUTS)(given)


def _exchanged(given: Mapping[str, Any], group: Group) -> float:
    _, ranks, own = group
    x = given.get("input", given.get("input_tensors"))
    if not isinstance(x, Tensor):  # a list of tensors, one for each rank
        assert isinstance(x, Sequence)
        return float(sum(_size(part) for rank, part in enumerate(x) if rank != own))
    parts = list(given.get("input_split_sizes") or [])
    if not parts:
        return (ranks - 1) / ranks * _size(x)
    return _size(x) * (1 - parts[own] / sum(parts)) if sum(parts) else 0.0


def _all(given: Mapping[str, Any], group: Group) -> float:
    return float(_of(*_INPUTS)(given))


def _nothing(given: Mapping[str, Any], group: Group) -> float:
    return 0.0


def _peers(given: Mapping[str, Any], group: Group) -> float:
    return float(sum(_size(x) for x, op in zip(given["tensors"], given["op_list"], strict=True) if op == "isend"))


_RULES: dict[str, tuple[str, Rule]] = {
    **dict.fromkeys(("allreduce_", "allreduce_coalesced_", "all_reduce", "all_reduce_"), ("all_reduce", _ring(2))),
    **dict.fromkeys(("all_reduce_coalesced", "all_reduce_coalesced_"), ("all_reduce", _ring(2))),
    **dict.fromkeys(("allgather_", "_allgather_base_", "allgather_coalesced_"), ("all_gather", _gathered)),
    **dict.fromkeys(("allgather_into_tensor_coalesced_", "all_gather_into_tensor"), ("all_gather", _gathered)),
    **dict.fromkeys(("all_gather_into_tensor_out", "all_gather_into_tensor_coalesced"), ("all_gather", _gathered)),
    **dict.fromkeys(("reduce_scatter_", "_reduce_scatter_base_"), ("reduce_scatter", _ring(1))),
    **dict.fromkeys(("reduce_scatter_tensor_coalesced_", "reduce_scatter_tensor"), ("reduce_scatter", _ring(1))),
    **dict.fromkeys(("reduce_scatter_tensor_out", "reduce_scatter_tensor_coalesced"), ("reduce_scatter", _ring(1))),
    **dict.fromkeys(("alltoall_", "alltoall_base_", "all_to_all_single"), ("all_to_all", _exchanged)),
    **dict.fromkeys(("broadcast", "broadcast_"), ("broadcast", _ring(1))),
    "reduce_": ("reduce", _ring(1)),
    "gather_": ("gather", _ring(1)),
    "scatter_": ("scatter", _ring(1, "output_tensors")),
    **dict.fromkeys(("send", "isend"), ("send", _all)),
    **dict.fromkeys(("recv_", "recv_any_source_", "irecv"), ("recv", _nothing)),
    "batch_p2p_ops": ("send", _peers),
    **dict.fromkeys(("barrier", "monitored_barrier_"), ("barrier", _nothing)),
}
