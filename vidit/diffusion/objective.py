"""What the network predicts, how that becomes x and e, and the loss.

Every target is a fixed mixture y = p x + q e of the clean latent and the noise. With x_t = a x + s e that
is a 2 x 2 system, and D = a q - s p decides everything:

    x_hat = (q x_t - s y) / D        |x - x_hat| = (s / |D|) |y - y_hat|

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

import torch
from torch import Tensor

from vidit.config import Diffusion, Target, refuse
from vidit.diffusion.paths import Path, build_path, expand
from vidit.dtypes import wide


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

    def loss(self, output: Tensor, x: Tensor, noise: Tensor, t: Tensor, given_BT: Tensor | None = None) -> Tensor:
        """weight(t) |y - y_hat|^2, averaged over all but dim 0: (B,) fp32 (fp64 for fp64 input).

        Of x (B, C, T, ...) the frames marked in `given_BT` do not count; fewer than all of a row are.
        """
        dtype = torch.promote_types(wide(x.dtype), output.dtype)
        error = (output.to(dtype) - self.target(x.to(dtype), noise.to(dtype), t)) ** 2
        error = error * expand(self.weight(t), error)
        if given_BT is None:
            return error.flatten(1).mean(1)
        counted_BT = (~given_BT).to(dtype)
        return (error * expand(counted_BT[:, None], error)).flatten(1).mean(1) / counted_BT.mean(1)


def build_objective(c: Diffusion) -> Objective:
    """The objective that the config names. ConfigError for a combination that is not defined."""
    refuse((*c.path_faults(), *c.target_faults()))
    path = build_path(c)
    if c.target == "eps" and path.zero_terminal_snr:  # the config promises otherwise, but the table has underflowed
        raise ValueError(
            f"diffusion.target=eps: after {c.num_train_steps} steps of these betas the SNR is 0 in fp64, where x_hat "
            "divides by a = 0; use target=v or x, or lower diffusion.beta_end"
        )
    gamma = c.min_snr_gamma if c.weighting == "min_snr" else None
    return Objective(path, c.target, c.sigma_data, gamma)
