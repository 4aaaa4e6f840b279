"""A matrix product and a copy on every device, with numbers that are known: a device that computes wrongly is worse
than one that computes slowly.

The product of small integers is exact in every precision that the matrix units add up in fp32, so one wrong bit shows.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

from cluster.health.asked import Asked
from cluster.health.finding import Finding, equal, within

SIZES = {"cpu": (256, 1 << 22), "cuda": (8192, 1 << 30)}  # of a side, and bytes of a copy
REPEATS = 5
WRONG = "do not train on it: drain the node"
SLOW = "look at clocks and at who else runs there; drain the node if it stays"


def compute(asked: Asked) -> Iterator[Finding]:
    """On each GPU, or on the CPU where none is expected."""
    import torch

    if not asked.gpus:
        yield from on_device(torch.device("cpu"), asked)
        return
    visible = torch.cuda.device_count()
    yield equal("GPUs that torch sees", visible, asked.gpus, "compare CUDA_VISIBLE_DEVICES with --gpus, and the driver")
    for number in range(min(visible, asked.gpus)):
        yield from on_device(torch.device("cuda", number), asked)


def on_device(device: Any, asked: Asked) -> Iterator[Finding]:
    """Wrong elements of a product and of a copy, and the rates of both: FLOP/s, and bytes read and written a second."""
    import torch

    side, num_bytes = SIZES[device.type]
    name = str(device).replace(":", " ")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    at = torch.arange(side, device=device)
    # Every element is side * (i % 8) * (j % 8): at most 49 times a power of two, exact in bf16.
    a = (at[:, None] % 8).expand(side, side).to(dtype)
    b = (at[None, :] % 8).expand(side, side).to(dtype)
    wanted = side * (at[:, None] % 8) * (at[None, :] % 8)
    product, seconds = _timed(device, lambda: a @ b)
    yield equal(f"{name} wrong elements of a product", int((product != wanted).sum()), 0, WRONG)
    yield within(f"{name} FLOP/s", 2 * side**3 / seconds, asked.band("matmul_flops"), SLOW)
    source = torch.arange(num_bytes // 4, dtype=torch.int32, device=device)
    copy, seconds = _timed(device, source.clone)
    yield equal(f"{name} wrong elements of a copy", int((copy != source).sum()), 0, WRONG)
    yield within(f"{name} copied bytes/s", 2 * num_bytes / seconds, asked.band("copy_bytes_s"), SLOW)


def _timed(device: Any, call: Callable[[], Any]) -> tuple[Any, float]:
    """The last result, and the shortest of a few times."""
    import torch

    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return result, best
