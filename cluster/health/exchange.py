"""One rank of an all-reduce whose sum is known: `python -m cluster.health.exchange JSON`, a process of its own.

A collective that hangs takes its process along and nothing else. Prints wrong elements and bytes a second: those of the
bus, 2 (n - 1) / n times the bytes of the tensor, which is what every link carries whatever the number of ranks.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

from cluster.health.guard import die_with_parent

NUM_BYTES = {"nccl": 256 << 20, "gloo": 4 << 20}
REPEATS = 4


@dataclass(frozen=True)
class Rank:
    """Which rank of how many, of which round, on which GPU (None = the CPU), and the store they meet at."""

    address: str
    port: int
    tag: str
    rank: int
    world: int
    gpu: int | None
    limit_s: float

    def argv(self) -> list[str]:
        return [sys.executable, "-m", "cluster.health.exchange", json.dumps(asdict(self))]


def all_reduce(it: Rank) -> tuple[int, float]:
    """Wrong elements, and bytes of the bus a second."""
    import torch
    import torch.distributed as dist

    limit = timedelta(seconds=it.limit_s)
    backend = "gloo" if it.gpu is None else "nccl"
    device = torch.device("cpu") if it.gpu is None else torch.device("cuda", it.gpu)
    if it.gpu is not None:
        torch.cuda.set_device(device)
    store = dist.PrefixStore(it.tag, dist.TCPStore(it.address, it.port, is_master=False, timeout=limit))
    dist.init_process_group(backend, store=store, rank=it.rank, world_size=it.world, timeout=limit)
    # Whole numbers whose sums over 4096 ranks stay below 2^24, so fp32 is exact; they differ by rank and by place.
    pattern = (torch.arange(NUM_BYTES[backend] // 4, device=device) % 61).float()
    wanted = pattern * sum(rank % 64 + 1 for rank in range(it.world))
    wrong, best = 0, float("inf")
    for _ in range(REPEATS):
        mine = pattern * (it.rank % 64 + 1)
        if it.gpu is not None:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        dist.all_reduce(mine)
        if it.gpu is not None:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
        wrong = max(wrong, int((mine != wanted).sum()))
    return wrong, 2 * (it.world - 1) / it.world * NUM_BYTES[backend] / best


def main() -> None:
    """The command."""
    die_with_parent()
    wrong, rate = all_reduce(Rank(**json.loads(sys.argv[1])))
    print(json.dumps({"wrong": wrong, "rate": rate}), flush=True)


if __name__ == "__main__":
    main()
