"""The VAE as torch.export programs, which run without this project.

`program.module()` is a function of one tensor: `encode` maps pixels (B, 3, 1 + t n, H, W) in [-1, 1]
to the mean of the whitened latent, which is what a DiT of this project is trained on, and `decode` maps that back.
Free are B, n from 1 on, and H and W from two latents on. An image is coded by repeating it 1 + t times: torch.export
would take a video of one frame for a program of its own.
"""

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from vidit.vae.autoencoder import CausalVae


class EncodeProgram(nn.Module):
    """Pixels -> the whitened mean."""

    def __init__(self, vae: CausalVae):
        super().__init__()
        self.vae = vae

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return self.vae.whiten(self.vae.encode(x_BCTHW).mean)


class DecodeProgram(nn.Module):
    """A whitened latent -> pixels."""

    def __init__(self, vae: CausalVae):
        super().__init__()
        self.vae = vae

    def forward(self, z_BCTHW: Tensor) -> Tensor:
        return self.vae.decode(self.vae.unwhiten(z_BCTHW))


@torch.no_grad()
def vae_programs(vae: CausalVae) -> dict[str, ExportedProgram]:
    """`encode` and `decode` of a frozen VAE, on its device and in its dtype."""
    c = vae.config
    t, s = c.temporal_stride, c.spatial_stride
    device = vae.latent_mean.device
    batch, frames, rows, columns = Dim("batch"), Dim("frames", min=1), Dim("rows", min=2), Dim("columns", min=2)
    x = torch.zeros(2, 3, 1 + 2 * t, 3 * s, 4 * s, device=device)
    z = torch.zeros(2, c.latent_channels, 3, 3, 4, device=device)
    pixels = {0: batch, 2: t * frames + 1, 3: s * rows, 4: s * columns}
    latent = {0: batch, 2: frames + 1, 3: rows, 4: columns}
    return {
        "encode": export(EncodeProgram(vae), (x,), dynamic_shapes=(pixels,)),
        "decode": export(DecodeProgram(vae), (z,), dynamic_shapes=(latent,)),
    }
