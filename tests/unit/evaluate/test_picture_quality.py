"""PSNR and SSIM at values that follow from their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vidit.evaluate.picture_quality import psnr_rows, sharpness_rows, ssim_rows


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def test_psnr() -> None:
    a = torch.zeros(2, 3, 2, 16, 16)
    b = torch.stack((a[0] + 0.2, a[1] + 0.02))
    assert psnr_rows(a, b).tolist() == pytest.approx([20, 40], rel=1e-5)
    assert psnr_rows(a, a).tolist() == [float("inf")] * 2


def ssim_by_hand(a: np.ndarray, b: np.ndarray, peak: float) -> float:
    """Equation 13 of Wang et al. 2004 with its 11 x 11 Gaussian, window by window, of one grey picture."""
    line = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weight = np.outer(line, line) / np.outer(line, line).sum()
    values = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mp, mq = (weight * p).sum(), (weight * q).sum()
            vp, vq = (weight * (p - mp) ** 2).sum(), (weight * (q - mq) ** 2).sum()
            both = (weight * (p - mp) * (q - mq)).sum()
            c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
            values.append((2 * mp * mq + c1) * (2 * both + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


def test_ssim_is_its_equation_in_every_window() -> None:
    a = noise(1, 2, 3, 2, 14, 17)
    b = 0.7 * a + 0.3 * noise(2, 2, 3, 2, 14, 17)
    found = ssim_rows(a, b)
    for row in range(2):
        each = [ssim_by_hand(a[row, c, t].numpy(), b[row, c, t].numpy(), 2.0) for c in range(3) for t in range(2)]
        assert float(found[row]) == pytest.approx(np.mean(each), rel=1e-9)


def test_ssim_at_known_values() -> None:
    a = noise(3, 1, 3, 1, 32, 32)
    assert ssim_rows(a, a).item() == pytest.approx(1)
    flat, other = torch.full((1, 3, 1, 16, 16), 0.5), torch.full((1, 3, 1, 16, 16), 0.25)
    expected = (2 * 0.5 * 0.25 + 4e-4) / (0.5**2 + 0.25**2 + 4e-4)
    assert ssim_rows(flat, other).item() == pytest.approx(expected, rel=1e-4), "only brightness differs"
    assert abs(ssim_rows(a, noise(4, 1, 3, 1, 32, 32)).item()) < 0.1
    with pytest.raises(ValueError, match="8x16 are smaller than SSIM's window of 11"):
        ssim_rows(flat[..., :8, :], other[..., :8, :])


def test_blur_lowers_sharpness_and_noise_raises_it() -> None:
    ramp = torch.linspace(-1, 1, 16).view(1, 1, 1, 1, 16).expand(1, 3, 2, 16, 16)
    assert sharpness_rows(ramp).item() == pytest.approx(0.5 * 2 / 15)
    assert float(sharpness_rows(ramp + 0.1 * noise(1, 1, 3, 2, 16, 16))) > float(sharpness_rows(ramp))
