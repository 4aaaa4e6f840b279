"""The Frechet distance of two sets of features, as FID (1706.08500) and FVD (1812.01717) take it.

What is measured depends on the network whose features they are; whoever reports a number says which.
"""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor


class VideoFeatures(Protocol):
    """What gives features of videos (B, 3, T, H, W) in [-1, 1]: (B, D)."""

    def video_features(self, x_BCTHW: Tensor) -> Tensor: ...


def features_of(network: VideoFeatures, videos: Iterable[Tensor]) -> Tensor:
    """(N, D) in fp64 on the CPU, of batches of videos."""
    return torch.cat([network.video_features(video).double().cpu() for video in videos])


def frechet_distance(a_ND: Tensor, b_ND: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), S the covariances. ValueError for fewer than 2 rows.

    Far fewer rows than features leave most of the covariance to chance: compare such distances only with one another.
    """
    if min(len(a_ND), len(b_ND)) < 2:
        raise ValueError(f"a Frechet distance of {len(a_ND)} and {len(b_ND)} videos: it takes at least 2 of each")
    a, b = a_ND.double(), b_ND.double()
    root = _root(torch.cov(a.T))
    # S_a S_b has the eigenvalues of the symmetric root S_b root.
    shared = torch.linalg.eigvalsh(root @ torch.cov(b.T) @ root).clamp(min=0).sqrt().sum()
    spread = torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * shared
    return float((a.mean(0) - b.mean(0)).square().sum() + spread)


def _root(symmetric: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
