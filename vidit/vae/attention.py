"""Attention among the places of a frame, in the middle of encoder and decoder (latent diffusion, 2112.10752; Wan).

It sees one frame, so the VAE stays causal and chunks of frames give what the whole gives; a tile, or a part of the
rows, does not. Its memory grows with the places of the coarsest level, its work with their square.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from vidit.config import Vae
from vidit.vae.layers import CausalConv3d
from vidit.vae.norms import added, build_norm


class FrameAttention(nn.Module):
    """norm, attention with one head as wide as the channels, projection, plus the input. Keeps shape and dtype."""

    def __init__(self, c: Vae, channels: int):
        super().__init__()
        self.norm = build_norm(c, channels)
        self.query, self.key, self.value, self.out = (CausalConv3d(channels, channels, kernel=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        # Each (B, T, H W, C): frames are batches, and the one head is the channels.
        query, key, value = (layer(normed).movedim(1, -1).flatten(2, 3) for layer in (self.query, self.key, self.value))
        seen = F.scaled_dot_product_attention(query, key, value)
        return added(self.out(seen.unflatten(2, x.shape[3:]).movedim(-1, 1)), x)
