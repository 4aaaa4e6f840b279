"""Randomness by key: the numbers follow from (seed, purpose, counters), never from what ran before.

A clip's noise, timestep, caption dropout and crop, and every initial weight, are drawn from a generator
made for just that purpose, so the loss curve is the same on every layout and after every resume (EDM2's
training loop counts samples in the same spirit). Nothing here is stored in a checkpoint.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor


def key(seed: int, purpose: str, *counters: int | str) -> int:
    """A 63-bit integer that depends on every argument and on nothing else."""
    text = "\0".join(map(str, (seed, purpose, *counters)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *counters: int | str) -> np.random.Generator:
    """A generator of its own for (seed, purpose, counters).

    Philox takes the whole key; torch's CPU generator would keep 32 bits of it, and rows of a long run would
    share their noise.
    """
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *counters)))


def normal(shape: tuple[int, ...], seed: int, purpose: str, counters: list[int]) -> Tensor:
    """Standard normal fp32, one generator for each row: (len(counters), *shape), on the CPU."""
    rows = [generator(seed, purpose, n).standard_normal(shape, np.float32) for n in counters]
    return torch.from_numpy(np.stack(rows))


def uniform(seed: int, purpose: str, counters: list[int]) -> Tensor:
    """One number in [0, 1) for each counter: (len(counters),) fp64, on the CPU."""
    # 53 bits, what fp64 holds: more would round up to 1.
    return torch.tensor([(key(seed, purpose, n) >> 10) / 2.0**53 for n in counters], dtype=torch.float64)
