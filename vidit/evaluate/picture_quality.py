"""How near two videos are, without a network: PSNR and SSIM of each row, in the mean over frames."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", section III.C.
SIGMA, RADIUS, K1, K2 = 1.5, 5, 0.01, 0.03
PEAK = 2.0  # of pixels in [-1, 1]


def psnr_rows(a_BCTHW: Tensor, b_BCTHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of videos in [-1, 1]; infinite for equal ones."""
    return 10 * torch.log10(PEAK**2 / (a_BCTHW - b_BCTHW).square().flatten(1).mean(1))


def ssim_rows(a_BCTHW: Tensor, b_BCTHW: Tensor) -> Tensor:
    """Structural similarity (equation 13) of videos in [-1, 1], of each colour by itself; 1 for equal ones.

    Where a window of 11 x 11 lies inside the frame. ValueError for smaller frames.
    """
    if min(a_BCTHW.shape[-2:]) < 2 * RADIUS + 1:
        side = 2 * RADIUS + 1
        raise ValueError(f"frames of {a_BCTHW.shape[-2]}x{a_BCTHW.shape[-1]} are smaller than SSIM's window of {side}")
    a, b = (x.flatten(0, 2).unsqueeze(1) for x in (a_BCTHW, b_BCTHW))
    mean_a, mean_b = _windows(a), _windows(b)
    var_a, var_b = _windows(a * a) - mean_a**2, _windows(b * b) - mean_b**2
    both = _windows(a * b) - mean_a * mean_b
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * both + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean((1, 2, 3)).unflatten(0, (len(a_BCTHW), -1)).mean(1)


def sharpness_rows(x_BCTHW: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, of videos in [-1, 1]: blur lowers it, noise raises it."""
    down, right = x_BCTHW.diff(dim=-2).abs(), x_BCTHW.diff(dim=-1).abs()
    return 0.5 * (down.flatten(1).mean(1) + right.flatten(1).mean(1))


def _windows(x: Tensor) -> Tensor:
    """Gaussian means, rows then columns."""
    line = torch.arange(-RADIUS, RADIUS + 1, dtype=x.dtype, device=x.device)
    weight = torch.exp(-0.5 * (line / SIGMA) ** 2)
    weight = (weight / weight.sum()).view(1, 1, -1, 1)
    return F.conv2d(F.conv2d(x, weight), weight.transpose(2, 3))
