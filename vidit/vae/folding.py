"""Pixels as channels in front of the first convolution and behind the last: blocks of frames, rows and columns.

`vae.fold=pixels` keeps the numbers of a block; `haar` gives their Haar wavelets (WF-VAE, 2411.17459, section 3.1):
an orthogonal transform of the same numbers, along each axis, into means and differences at every scale, so that
what is smooth is in few channels. A block of n is transformed by `haar(n)`; that of time, rows and columns is
their Kronecker product, which is a matrix on channels.

Causal like everything else: (1 + n k) frames are (1 + n) blocks, and the first frame is a block by itself, repeated.
"""

import math
from functools import reduce

import torch
from einops import rearrange
from torch import Tensor, nn

from vidit.config import Vae
from vidit.vae.layers import DropFirst, Front


class Fold(nn.Module):
    """(B, 3, 1 + n k, H, W) -> (B, 3 k p p, 1 + n, H/p, W/p), for k = patch_frames and p = patch."""

    def __init__(self, c: Vae):
        super().__init__()
        self.k, self.p, self.haar = c.patch_frames, c.patch, c.fold == "haar"
        if self.k > 1:
            self.front = Front(self.k - 1, past=0)

    def forward(self, x: Tensor) -> Tensor:
        if self.k > 1:
            x = torch.cat((self.front(x), x), dim=2)
        last = rearrange(x, "b c (t k) (h p) (w q) -> b t h w c (k p q)", k=self.k, p=self.p, q=self.p)
        if self.haar:
            last = last @ block_transform(self.k, self.p).to(x).T
        return last.flatten(4).movedim(-1, 1)


class Unfold(nn.Module):
    """The inverse of `Fold`."""

    def __init__(self, c: Vae):
        super().__init__()
        self.k, self.p, self.haar = c.patch_frames, c.patch, c.fold == "haar"
        if self.k > 1:
            self.drop = DropFirst(self.k - 1)

    def forward(self, x: Tensor) -> Tensor:
        last = x.movedim(1, -1).unflatten(-1, (-1, self.k * self.p**2))
        if self.haar:
            last = last @ block_transform(self.k, self.p).to(x)
        out = rearrange(last, "b t h w c (k p q) -> b c (t k) (h p) (w q)", k=self.k, p=self.p, q=self.p)
        return self.drop(out) if self.k > 1 else out


def haar(n: int) -> Tensor:
    """The orthogonal n x n Haar matrix, n a power of 2: the mean first, then differences from coarse to fine."""
    if n == 1:
        return torch.ones(1, 1)
    means = torch.kron(haar(n // 2), torch.tensor([[1.0, 1.0]]))
    differences = torch.kron(torch.eye(n // 2), torch.tensor([[1.0, -1.0]]))
    return torch.cat((means, differences)) / math.sqrt(2)


def block_transform(frames: int, side: int) -> Tensor:
    """The transform of a block of frames x side x side pixels, a square matrix."""
    return reduce(torch.kron, (haar(frames), haar(side), haar(side)))
