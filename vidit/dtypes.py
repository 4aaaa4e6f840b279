"""Where fp32 is the floor: norms, angles, modulation and losses widen what is narrower and leave fp64 alone."""

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or the dtype itself where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def widen(x: Tensor) -> Tensor:
    """x in at least fp32."""
    return x.to(wide(x.dtype))
