"""Layout arithmetic without a process group, and meshes of 512 and 4096 ranks in one process (the fake backend)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.layout import AXES, Layout, LayoutError, refuse
from parallel.mesh import Mesh, build_mesh, ranks_per_node


@contextmanager
def fake(world: int, rank: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


LARGE = {512: Layout(2, 2, 4, 4, 8), 4096: Layout(4, 8, 8, 2, 8)}


def ranks_of(mesh: Mesh) -> dict[str, list[int]]:
    parts = {"tensor": mesh.tensor, "sequence": mesh.sequence, "pipeline": mesh.pipeline}
    return {name: part.mesh.flatten().tolist() for name, part in parts.items()}


class TestLargeMeshes:
    @pytest.mark.parametrize("world", LARGE)
    def test_groups_of_ranks_at_the_ends_and_between(self, world: int) -> None:
        layout = LARGE[world]
        for rank in (0, 7, 8, world // 2 - 1, world - 1):
            with fake(world, rank):
                mesh = build_mesh(layout, "cpu", 8)
                found, zero = ranks_of(mesh), mesh.zero
                zero_mesh, zero_shape = zero.mesh.clone(), tuple(zero.shape)
                data_rank = mesh.data_rank
            tensor, sequence = layout.tensor, layout.sequence
            first = rank - rank % tensor
            assert found["tensor"] == list(range(first, first + tensor))
            start = rank - rank % (tensor * sequence) + rank % tensor
            assert found["sequence"] == [start + i * tensor for i in range(sequence)]
            assert len(found["pipeline"]) == layout.pipeline
            assert rank in found["pipeline"]
            assert zero_shape == (layout.replicate, layout.shard * sequence)
            assert rank in zero_mesh
            assert data_rank == rank // (tensor * sequence) % layout.data

    @pytest.mark.parametrize("world", LARGE)
    def test_tensor_groups_lie_in_one_node(self, world: int) -> None:
        layout = LARGE[world]
        assert list(layout.faults(world, 8)) == []
        assert layout.nodes_of("tensor", 8) == 1
        assert layout.nodes_of("sequence", 8) == layout.sequence
        assert Layout(shard=world // 8, sequence=4, tensor=2).nodes_of("sequence", 8) == 1

    def test_ranks_divide_the_rows_alike(self) -> None:
        """The ranks of one tensor and sequence group read the same rows, the groups different ones."""
        layout = Layout(1, 2, 2, 2, 2)
        rows = []
        for rank in range(16):
            with fake(16, rank):
                rows.append(build_mesh(layout, "cpu").data_rank)
        assert rows == [n for n in range(4) for _ in range(4)]

    def test_no_replicas_is_one_dim(self) -> None:
        with fake(8, 3):
            mesh = build_mesh(Layout(shard=2, sequence=2, tensor=2), "cpu")
            assert mesh.zero.ndim == 1
            assert torch.equal(mesh.zero.mesh, torch.tensor([1, 3, 5, 7], dtype=mesh.zero.mesh.dtype))


BAD = [
    (Layout(shard=3), 8, None, "= 3 ranks, but 8 are started", "set parallel.shard=8"),
    (Layout(tensor=3), 8, None, "= 3 ranks, but 8 are started", "take 3 ranks, which do not divide 8"),
    (Layout(sequence=0), 8, None, "parallel.sequence=0", "at least 1"),
    (Layout(shard=4, tensor=3), 12, 4, "parallel.tensor=3 does not divide the 4 ranks", "use one of 1 2 4"),
    (Layout(shard=3, sequence=3, tensor=2), 18, 6, "", ""),
    (Layout(shard=8, sequence=3), 24, 8, "parallel.sequence=3 with parallel.tensor=1", "use one of 1 2 4 8 16"),
    (Layout(shard=10), 10, 4, "10 ranks do not fill nodes of 4", "one of 1 2 5 10"),
]


@pytest.mark.parametrize(("layout", "world", "node", "fault", "cure"), BAD)
def test_faults(layout: Layout, world: int, node: int | None, fault: str, cure: str) -> None:
    found = list(layout.faults(world, node))
    if not fault:
        assert found == []
        return
    assert len(found) == 1
    assert fault in found[0]
    assert cure in found[0]


def test_sequence_may_fill_whole_nodes() -> None:
    assert list(Layout(shard=2, sequence=16).faults(32, 8)) == []
    assert Layout(shard=2, sequence=16).nodes_of("sequence", 8) == 2


def test_heads() -> None:
    assert list(Layout(tensor=5).head_faults(24)) == [
        "24 heads are not divisible by parallel.tensor=5; use one of 1 2 3 4 6 8 12 24"
    ]
    assert list(Layout(sequence=8, tensor=2).ulysses_faults(24)) == [
        "12 heads (24 / tensor 2) are not divisible by parallel.sequence=8 in the kind ulysses; use one of 1 2 3 4 6 12"
    ]
    assert list(Layout(sequence=4, tensor=2).ulysses_faults(24)) == []
    assert list(Layout(tensor=5).ulysses_faults(24)) == []  # head_faults says it


def test_all_faults_at_once() -> None:
    bad = Layout(shard=2, sequence=3)
    with pytest.raises(LayoutError, match="2 faults") as caught:
        refuse([*bad.faults(8), *bad.ulysses_faults(4)])
    assert len(caught.value.faults) == 2


def test_no_group_is_made_for_a_wrong_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise AssertionError("a process group was made")

    with fake(8, 0):
        monkeypatch.setattr("parallel.mesh.init_device_mesh", refused)
        with pytest.raises(LayoutError, match=r"set parallel\.shard=4"):
            build_mesh(Layout(tensor=2), "cpu")


def test_ranks_per_node_comes_from_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert ranks_per_node() is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert ranks_per_node() == 8


def test_axes_are_the_fields() -> None:
    assert tuple(Layout.__dataclass_fields__) == AXES
    assert Layout(1, 2, 3, 5, 7).degrees == (1, 2, 3, 5, 7)
