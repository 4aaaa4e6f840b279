"""What the network predicts, how that becomes x and e, and the loss.

Every target is a fixed mixture y = p x + q e of the clean latent and the noise. With x_t = a x + s e that
is a 2 x 2 system, and D = a q - s p decides everything:

    x_hat = (q x_t - s y) / D        e_hat = (a y - p x_t) / D        |x - x_hat| = (s / |D|) |y - y_hat|

    target   p                    q              D           paper
    eps      0                    1              a           DDPM (2006.11239)
    x        1                    0              -s
    v        -s                   a              a^2 + s^2   Salimans & Ho (2202.00512), v = a e - s x
    flow     -1                   1              a + s       rectified flow, convention A, v = e - x
    edm      s / (sd r)           -sd / r        -r / sd     EDM (2206.00364) eq. 7, r = sqrt(s^2 + sd^2)

The edm row is c_skip, c_out solved for F: x_hat = c_skip x_t + c_out F, so its loss lambda |x - x_hat|^2 with
lambda = 1 / c_out^2 is exactly |F - F_hat|^2. Losses are therefore always taken on the network's own output.

Conversions run in fp32 (fp64 for fp64 input) whatever the network's dtype.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vidit.config import Diffusion
from vidit.diffusion.paths import Path, build_path, expand
from vidit.dtypes import wide

Target = Literal["flow", "eps", "x", "v", "edm"]

LEGAL_TARGETS: dict[str, tuple[Target, ...]] = {
    "flow": ("flow", "x", "v"),
    "vp": ("eps", "x", "v"),
    "edm": ("edm",),
}


@dataclass(frozen=True)
class Objective:
    """Target, conversions and loss of one path. Built by `build_objective`, which checks the combination.

    Shapes: x, noise, x_t, output (B, ...); t (B,) or any prefix of x's shape.
    """

    path: Path
    target_kind: Target
    sigma_data: float = 1.0
    min_snr_gamma: float | None = None
    """Cap of the min-SNR weight; None gives every noise level the weight 1."""

    def _mixture(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(p, q) of the table above, in t's shape."""
        a, s = self.path.alpha(t), self.path.sigma(t)
        if self.target_kind == "eps":
            return torch.zeros_like(s), torch.ones_like(s)
        if self.target_kind == "x":
            return torch.ones_like(s), torch.zeros_like(s)
        if self.target_kind == "v":
            return -s, a
        if self.target_kind == "flow":
            return -torch.ones_like(s), torch.ones_like(s)
        r = torch.hypot(s, torch.full_like(s, self.sigma_data))
        return s / (self.sigma_data * r), -self.sigma_data / r

    def _determinant(self, t: Tensor) -> Tensor:
        p, q = self._mixture(t)
        return self.path.alpha(t) * q - self.path.sigma(t) * p

    def network_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """c_in x_t on the EDM path (unit variance at every sigma), x_t itself elsewhere."""
        if self.target_kind != "edm":
            return x_t
        s = self.path.sigma(t)
        return x_t / expand(torch.hypot(s, torch.full_like(s, self.sigma_data)), x_t)

    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """y = p x + q e: what the network should output at time t."""
        p, q = self._mixture(t)
        return expand(p, x) * x + expand(q, x) * noise

    def denoised(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x_hat from the network's output at x_t."""
        if self.target_kind == "x":  # the general form divides by s, which is 0 at the clean end
            return output.to(wide(output.dtype))
        q, s, d = self._mixture(t)[1], self.path.sigma(t), self._determinant(t)
        return expand(q / d, x_t) * x_t - expand(s / d, x_t) * output

    def eps(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """e_hat from the network's output at x_t; not finite for x and edm at s = 0, where there is none."""
        a, p, d = self.path.alpha(t), self._mixture(t)[0], self._determinant(t)
        return expand(a / d, x_t) * output - expand(p / d, x_t) * x_t

    def _error_ratio(self, t: Tensor) -> Tensor:
        """|x - x_hat|^2 / |y - y_hat|^2 at the same network error: (s / D)^2."""
        if self.target_kind == "x":
            return torch.ones_like(self.path.sigma(t))
        return (self.path.sigma(t) / self._determinant(t)) ** 2

    def weight(self, t: Tensor) -> Tensor:
        """Weight of |y - y_hat|^2 at time t, in t's shape.

        min-SNR-gamma (Hang et al. 2303.09556) caps the weight of |x - x_hat|^2 at min(SNR, gamma), which on
        the output is min(SNR, g) for x, min(SNR, g) / SNR for eps, min(SNR, g) / (SNR + 1) for v and, by the
        same rule, min(SNR, g) t^2 for flow.
        """
        if self.min_snr_gamma is None:
            return torch.ones_like(self.path.sigma(t))
        snr = (self.path.alpha(t) / self.path.sigma(t)) ** 2
        return snr.clamp(max=self.min_snr_gamma) * self._error_ratio(t)

    def data_weight(self, t: Tensor) -> Tensor:
        """The same weight seen from |x - x_hat|^2: SNR for eps, SNR + 1 for v, lambda(sigma) for edm."""
        return self.weight(t) / self._error_ratio(t)

    def loss(self, output: Tensor, x: Tensor, noise: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:
        """weight(t) |y - y_hat|^2, averaged over all but dim 0: (B,) fp32 (fp64 for fp64 input).

        mask broadcasts against x and is 1 where the loss counts (0 on given frames or padding); a clip with
        nothing to count has loss 0.
        """
        dtype = torch.promote_types(wide(x.dtype), output.dtype)
        error = (output.to(dtype) - self.target(x.to(dtype), noise.to(dtype), t)) ** 2
        error = error * expand(self.weight(t), error)
        if mask is None:
            return error.flatten(1).mean(1)
        counted = mask.to(error.device, torch.bool).expand_as(error)
        # where, not a product: padding may hold anything, and 0 x nan is nan.
        total = torch.where(counted, error, torch.zeros_like(error)).flatten(1).sum(1)
        return total / counted.flatten(1).sum(1).clamp(min=1)


def build_objective(c: Diffusion) -> Objective:
    """The objective that the config names. ValueError for a combination that is not defined."""
    path = build_path(c)
    if c.target == "eps" and path.zero_terminal_snr:
        cure = "target=v or x, or zero_terminal_snr=false" if c.path == "vp" else "target=flow, x or v"
        raise ValueError(
            f"diffusion.target=eps is undefined on path {c.path}: its last step has SNR 0, where x_hat = "
            f"(x_t - s e) / a divides by a = 0; use {cure}"
        )
    if c.target not in LEGAL_TARGETS[c.path]:
        legal = " ".join(LEGAL_TARGETS[c.path])
        raise ValueError(f"diffusion.target={c.target} is not defined on path {c.path}; use one of {legal}")
    if c.weighting not in ("none", "min_snr"):
        raise ValueError(f"unknown diffusion.weighting={c.weighting!r}; use none or min_snr")
    if c.weighting == "min_snr" and c.path == "edm":
        raise ValueError("diffusion.weighting=min_snr and EDM's own lambda(sigma) exclude each other; use none")
    gamma = c.min_snr_gamma if c.weighting == "min_snr" else None
    return Objective(path, c.target, c.sigma_data, gamma)
