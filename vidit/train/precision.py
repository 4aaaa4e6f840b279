"""Device and compute dtype of a run, and whether its kernels sum in one order.

Master weights, optimizer state and the loss are always fp32. bf16 pays only where the processor multiplies
it natively: CUDA from compute capability 8, CPUs with AVX512-BF16 or AMX. Elsewhere it is emulated, tens of
times slower than fp32.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

log = logging.getLogger(__name__)
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def choose_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of a run; RuntimeError when CUDA is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("train.device=cuda, but torch sees no CUDA device; use train.device=auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """With `on`, kernels whose sums have the same order every time; RuntimeError by an operator that has none."""
    if not on:
        yield
        return
    before = torch.get_deterministic_debug_mode()
    filled: Any = torch.utils.deterministic
    fills, workspace = filled.fill_uninitialized_memory, os.environ.get(WORKSPACE)
    os.environ[WORKSPACE] = workspace or ":4096:8"  # without it torch refuses products on CUDA
    torch.use_deterministic_algorithms(True)
    filled.fill_uninitialized_memory = False  # nothing here reads what nobody wrote
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        filled.fill_uninitialized_memory = fills
        if workspace is None:
            del os.environ[WORKSPACE]


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are native on the device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def choose_dtype(precision: Literal["auto", "fp32", "bf16", "fp64"], device: torch.device) -> torch.dtype:
    """The compute dtype: what is asked for, or bf16 where it is native and fp32 elsewhere."""
    if precision == "fp64":
        return torch.float64
    if precision == "auto":
        return torch.bfloat16 if has_bf16(device) else torch.float32
    if precision == "bf16" and not has_bf16(device):
        log.warning("train.precision=bf16 is emulated on this %s: expect it far slower than fp32", device.type)
    return torch.bfloat16 if precision == "bf16" else torch.float32
