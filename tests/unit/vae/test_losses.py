"""Terms of the loss, against what they are made of."""

from __future__ import annotations

import math

import pytest
import torch

from vidit.vae.autoencoder import Posterior
from vidit.vae.losses import kl_rows, l1_rows, l2_rows, psnr_rows, wavelet_rows


def clip(frames: int = 3) -> torch.Tensor:
    return torch.randn(2, 3, frames, 4, 6, generator=torch.Generator().manual_seed(1))


def test_rows_are_means_of_their_own_clip() -> None:
    x = clip()
    for one, each in ((l1_rows, x.abs()), (l2_rows, x.square())):
        assert one(x).tolist() == pytest.approx([float(row.mean()) for row in each])
    q = Posterior(clip(), 0.1 * clip() - 2)
    assert float(kl_rows(q).mean()) == pytest.approx(float(q.kl()), rel=1e-6)
    assert float(psnr_rows(torch.tensor([0.04]))) == pytest.approx(20)


def test_wavelets_are_blind_to_what_is_smooth_and_see_the_rest() -> None:
    flat = torch.ones(1, 3, 3, 4, 6)
    assert float(wavelet_rows(flat)) == 0
    stripes = flat * torch.tensor([1.0, -1.0]).repeat(3)
    assert float(wavelet_rows(stripes)) == pytest.approx(2 / 3), "one of three bands of (1, -1, 1, -1) is 2"
    flicker = flat * torch.tensor([0.0, 1.0, 0.0]).view(1, 1, 3, 1, 1)
    assert float(wavelet_rows(flicker)) == pytest.approx(1 / math.sqrt(2))
    assert wavelet_rows(clip(1)).shape == (2,)
