"""Rotary position embedding over (time, height, width) (RoFormer, 2104.09864; 3D split as CogVideoX).

Attention sees only differences of positions, so the same angles serve windows of any place and size: the
embedding is window-relative by construction.
"""

import torch
from torch import Tensor

from vidit.dtypes import widen

THETA = 10_000.0


def rope_angles(position_S3: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (S, K/2) fp32: K/4 of the head dim for time, 3K/8 each for height and width."""
    shares = (head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8)
    angles = []
    for axis, share in enumerate(shares):
        frequency = THETA ** (-torch.arange(0, share, 2, device=position_S3.device, dtype=torch.float32) / share)
        angles.append(position_S3[:, axis, None].float() * frequency)
    angle_SK = torch.cat(angles, dim=-1)
    return angle_SK.cos(), angle_SK.sin()


def rotate(x_BSNK: Tensor, cos_SK: Tensor, sin_SK: Tensor) -> Tensor:
    """Rotate pairs (k, k + K/2) of every head by the token's angles; fp32 inside, the input's dtype outside."""
    x1, x2 = widen(x_BSNK).chunk(2, dim=-1)
    cos, sin = cos_SK[:, None, :], sin_SK[:, None, :]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x_BSNK.dtype)
