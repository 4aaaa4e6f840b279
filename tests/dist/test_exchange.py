"""What ranks tell one another: alone it costs nothing, together all know the same and fail alike."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch.distributed as dist

from parallel.exchange import (
    any_rank,
    exchange,
    first_fault,
    from_first,
    in_order,
    num_ranks,
    own_rank,
    same_everywhere,
    several,
    together,
)  # fmt: skip
from parallel.failure import RankError


def test_one_process_is_told_of_itself() -> None:
    assert not several()
    assert (own_rank(), num_ranks()) == (0, 1)
    assert exchange({"a": 1}) == [{"a": 1}]
    assert any_rank(True)
    assert not any_rank(False)
    assert from_first(lambda: (1, "x")) == (1, "x")
    assert first_fault("no room") == "no room"
    assert first_fault(None) is None
    with pytest.raises(ValueError, match="mine"), together():
        raise ValueError("mine")


def test_dealt_work_comes_back_in_order() -> None:
    assert in_order([["a", "d"], ["b", "e"], ["c", "f"]]) == list("abcdef")
    with pytest.raises(ValueError, match=r"shorter|longer"):
        in_order([["a", "b"], ["c"]])


def told(_: Any) -> dict[str, Any]:
    """On three ranks."""
    rank = dist.get_rank()
    found: dict[str, Any] = {
        "reports": exchange({"rank": rank, "text": "é" * rank, "number": math.nan if rank else 1.5})
    }
    found["any"] = [any_rank(rank == 1), any_rank(False)]
    found["first"] = from_first(lambda: ["from", rank])
    found["fault"] = first_fault("no room" if rank == 2 else None)
    caught: list[str] = []
    for culprits in ((), (1,), (0, 2)):
        try:
            with together():
                if rank in culprits:
                    raise OSError(f"disk of {rank}")
        except (OSError, RankError) as error:
            caught.append(f"{type(error).__name__} {error} {getattr(error, 'rank', '')}".strip())
    return found | {"caught": caught}


def test_several(pool: Any) -> None:
    ranks = pool.run(3, told, None)
    for rank, found in enumerate(ranks):
        assert [r["rank"] for r in found["reports"]] == [0, 1, 2]
        assert [r["text"] for r in found["reports"]] == ["", "é", "éé"]
        assert [math.isnan(r["number"]) for r in found["reports"]] == [False, True, True]
        assert found["any"] == [True, False]
        assert found["first"] == ["from", 0]
        assert found["fault"] == "rank 2: no room"
        own = {
            0: ["RankError rank 1: disk of 1 1", "OSError disk of 0"],
            1: ["OSError disk of 1", "RankError rank 0: disk of 0 0"],
            2: ["RankError rank 1: disk of 1 1", "OSError disk of 2"],
        }
        assert found["caught"] == own[rank]


def alike(_: Any) -> list[bool]:
    """On two ranks."""
    return [same_everywhere("clip 7"), same_everywhere(f"clip {dist.get_rank()}")]


def test_the_same_everywhere(pool: Any) -> None:
    assert pool.run(2, alike, None) == [[True, False]] * 2
    assert same_everywhere("alone")


def grouped(_: Any) -> list[str]:
    """Four ranks as 2 x 2: the nearer group first gives the order of ranks."""
    rank = dist.get_rank()
    near = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    far = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    return exchange(f"rank {rank}", (near, far))


def test_groups(pool: Any) -> None:
    assert pool.run(4, grouped, None) == [[f"rank {n}" for n in range(4)]] * 4
