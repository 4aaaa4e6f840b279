"""Rotary position embedding over (time, height, width) (RoFormer, 2104.09864).

Attention sees only differences of positions, so the same angles serve windows of any place and size: the
embedding is window-relative by construction.
"""

from typing import Literal

import torch
from torch import Tensor

from vidit.dtypes import widen

THETA = 10_000.0


Split = Literal["quarter", "third", "eighth", "time"]


def axis_pairs(head_dim: int, split: Split = "quarter") -> tuple[int, int, int]:
    """How many of a head's K/2 rotated pairs time, height and width have, what does not divide being time's.

    `quarter`: 1/4, 3/8, 3/8 (CogVideoX, 2408.06072); `third`: a third each (Wan, 2503.20314); `eighth`: 1/8, 7/16,
    7/16 (FLUX; HunyuanVideo, 2412.03603); `time`: all of them (STDiT3).
    """
    pairs = head_dim // 2
    space = {"quarter": pairs * 3 // 8, "third": pairs // 3, "eighth": pairs * 7 // 16, "time": 0}[split]
    return pairs - 2 * space, space, space


def rope_angles(
    position_S3: Tensor, head_dim: int, split: Split = "quarter", theta: float = THETA
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (S, K/2) fp32, time first, then height and width."""
    angles = []
    for axis, pairs in enumerate(axis_pairs(head_dim, split)):
        steps = torch.arange(pairs, device=position_S3.device, dtype=torch.float32)
        angles.append(position_S3[:, axis, None].float() * theta ** (-steps / pairs))
    angle_SK = torch.cat(angles, dim=-1)
    return angle_SK.cos(), angle_SK.sin()


def rotate(x_BSNK: Tensor, cos_SK: Tensor, sin_SK: Tensor) -> Tensor:
    """Rotate pairs (k, k + K/2) of every head by the token's angles; returned in at least fp32."""
    x1, x2 = widen(x_BSNK).chunk(2, dim=-1)
    cos, sin = cos_SK[:, None, :], sin_SK[:, None, :]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
