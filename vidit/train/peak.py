"""The denominator of MFU: the rate that this device reaches on large matrix products, measured."""

import functools
import time

import torch

SIZE = {"cpu": 1024, "cuda": 8192}


@functools.lru_cache(maxsize=4)
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of a few square products in `dtype`; takes about a tenth of a second."""
    n = SIZE[device.type]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
