"""Forward processes behind one face: x_t = a(t) x + s(t) e, with e ~ N(0, I) and t growing with the noise.

    path   t                                     a(t), s(t)             paper
    flow   0 (clean) .. 1 (noise)                1 - t, t               rectified flow, SD3 (2403.03206)
    vp     training step 0 .. N-1; -1 is clean   sqrt(abar), its mate   DDPM (2006.11239)
    edm    sigma 0 (clean) .. sigma_max          1, t                   EDM (2206.00364)

Everything else in this package (targets, samplers, guidance) reads a path through a(t) and s(t) alone, so a
new process is one class here. Flow times follow convention A of the formula sheet: t = 1 is noise and the
velocity v = e - x points from data to noise, as in SD3 and HunyuanVideo.

Contract: t is fp32, fp64 or an integer tensor of shape (B,), or any shape that is a prefix of x's (then every
latent frame may have its own time). Half precision is refused: in bf16 step 999 rounds to 1000.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from vidit.config import Diffusion, refuse
from vidit.dtypes import wide


def expand(scale_B: Tensor, x: Tensor) -> Tensor:
    """Append dims of size 1 until scale_B (a prefix of x's shape) broadcasts against x; fp32 or x's fp64."""
    return scale_B.to(x.device, wide(x.dtype)).reshape(*scale_B.shape, *[1] * (x.ndim - scale_B.ndim))


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = s t / (1 + (s-1) t): log-SNR falls by 2 log s (SD3 eq. 23, convention A). Same shape as t."""
    # The denominator is summed in this order so that t = 1 gives exactly 1: a = 1 - t must not turn negative.
    return shift * t / (shift * t + (1 - t))


def _real(t: Tensor) -> Tensor:
    if t.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"times are {t.dtype}, which rounds step 999 to 1000; pass fp32, fp64 or integers")
    return t if t.is_floating_point() else t.to(torch.float32)


class Path(ABC):
    """One forward process. Every method takes t of any shape and returns that shape, in t's dtype."""

    zero_terminal_snr: bool
    """True where the noisiest time has a = 0, so that eps alone says nothing about x there."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale a(t)."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale s(t)."""

    @abstractmethod
    def time_embedding_input(self, t: Tensor) -> Tensor:
        """What the network is conditioned on, about 0 .. 1000 so that one embedding fits all paths."""

    @abstractmethod
    def sampling_times(self, num_steps: int, shift: float = 1.0) -> Tensor:
        """Grid from the noisiest time to the clean one: (num_steps + 1,) fp64, strictly falling."""

    @abstractmethod
    def clock(self, t: Tensor) -> Tensor:
        """The time tau(t) in which the probability-flow ODE is written; see `velocity`."""

    @abstractmethod
    def velocity(self, x_hat: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Right side of the probability-flow ODE, dx/dtau = (da/dtau) x_hat + (ds/dtau) eps, like x_hat."""

    def start(self, noise: Tensor, t: Tensor) -> Tensor:
        """Where sampling starts: s(t) noise, for one scalar t, the noisiest of the grid."""
        return self.sigma(t).to(noise.device, noise.dtype) * noise

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = a(t) x + s(t) noise; x and noise (B, ...), t a prefix of that; fp32 or x's fp64."""
        return expand(self.alpha(t), x) * x + expand(self.sigma(t), x) * noise


class FlowPath(Path):
    """Rectified flow, convention A. Zero terminal SNR holds by construction."""

    zero_terminal_snr = True

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - _real(t)

    def sigma(self, t: Tensor) -> Tensor:
        return _real(t)

    def time_embedding_input(self, t: Tensor) -> Tensor:
        return 1000 * _real(t)

    def sampling_times(self, num_steps: int, shift: float = 1.0) -> Tensor:
        """Linear in t, then `shift_time`."""
        _check_steps(num_steps)
        return shift_time(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift)

    def clock(self, t: Tensor) -> Tensor:
        return _real(t)

    def velocity(self, x_hat: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """v = e - x: what the network predicts with target=flow."""
        return eps - x_hat


@dataclass(frozen=True, eq=False)
class VPPath(Path):
    """A discrete variance-preserving schedule, as a table over t = -1 (clean), 0, .., N-1.

    Between two steps (a, s) moves along the chord and is put back on the circle a^2 + s^2 = 1: unlike a
    linear log-SNR this stays finite at both ends, where log-SNR is infinite.
    """

    alphas: Tensor
    """sqrt(abar) with the clean end in front: (N + 1,) fp64, alphas[0] = 1."""
    sigmas: Tensor
    """sqrt(1 - abar) with the clean end in front: (N + 1,) fp64, sigmas[0] = 0."""

    @classmethod
    def from_alphas_bar(cls, abar: Tensor) -> "VPPath":
        """abar_t = prod (1 - beta): (N,), falling."""
        abar = torch.cat([torch.ones(1, dtype=torch.float64), abar.double()])
        return cls(abar.sqrt(), (1 - abar).sqrt())

    @property
    def num_train_steps(self) -> int:
        """N."""
        return len(self.alphas) - 1

    @property
    def zero_terminal_snr(self) -> bool:  # type: ignore[override]
        return bool(self.alphas[-1] == 0)

    def _scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        real = _real(t)
        low = real.floor()
        weight = (real - low).double()
        i = low.long() + 1
        j = (i + 1).clamp(max=self.num_train_steps)
        alphas, sigmas = self.alphas.to(t.device), self.sigmas.to(t.device)
        a, s = alphas[i].lerp(alphas[j], weight), sigmas[i].lerp(sigmas[j], weight)
        norm = torch.hypot(a, s)
        return (a / norm).to(real.dtype), (s / norm).to(real.dtype)

    def alpha(self, t: Tensor) -> Tensor:
        return self._scales(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        return self._scales(t)[1]

    def time_embedding_input(self, t: Tensor) -> Tensor:
        return _real(t) * (1000 / self.num_train_steps)

    def sampling_times(self, num_steps: int, shift: float = 1.0) -> Tensor:
        """Trailing spacing (Lin et al. 2305.08891, table 2): starts at N-1, the only step with SNR zero."""
        _check_steps(num_steps)
        n = self.num_train_steps
        if num_steps > n:
            raise ValueError(f"{num_steps} sampling steps on {n} training steps repeat a time; use at most {n}")
        if shift != 1:
            raise ValueError(f"shift={shift} has no meaning on a table of steps; set diffusion.snr_shift instead")
        steps = (n - torch.arange(num_steps, dtype=torch.float64) * (n / num_steps)).round() - 1
        return torch.cat([steps, torch.tensor([-1.0], dtype=torch.float64)])

    def clock(self, t: Tensor) -> Tensor:
        """The angle phi with a = cos phi, s = sin phi: 0 when clean, pi/2 at zero SNR."""
        a, s = self._scales(t)
        return torch.atan2(s, a)

    def velocity(self, x_hat: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """dx/dphi = a e - s x: the v of Salimans & Ho (2202.00512, app. D)."""
        return expand(self.alpha(t), x_hat) * eps - expand(self.sigma(t), x_hat) * x_hat

    def start(self, noise: Tensor, t: Tensor) -> Tensor:
        """Unit noise: x_T has unit variance (for data of unit variance) whether or not its SNR is zero."""
        return noise


@dataclass(frozen=True)
class EDMPath(Path):
    """Variance exploding, t = sigma (EDM, 2206.00364)."""

    sigma_min: float
    sigma_max: float
    zero_terminal_snr = False

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(_real(t))

    def sigma(self, t: Tensor) -> Tensor:
        return _real(t)

    def time_embedding_input(self, t: Tensor) -> Tensor:
        """1000 c_noise = 250 ln sigma; times under sigma_min, the clean end included, count as sigma_min."""
        return 250 * _real(t).clamp(min=self.sigma_min).log()

    def sampling_times(self, num_steps: int, shift: float = 1.0) -> Tensor:
        """EDM eq. 5 with rho = 7, then 0. A shift multiplies sigma = t / (1 - t), as in convention A."""
        _check_steps(num_steps)
        ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
        high, low = self.sigma_max ** (1 / 7), self.sigma_min ** (1 / 7)
        grid = shift * (high + ramp * (low - high)) ** 7
        return torch.cat([grid, torch.zeros(1, dtype=torch.float64)])

    def clock(self, t: Tensor) -> Tensor:
        return _real(t)

    def velocity(self, x_hat: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """dx/dsigma = e (EDM eq. 3)."""
        return eps


def alphas_bar(c: Diffusion) -> Tensor:
    """abar_t = prod (1 - beta) of the VP schedule, after SNR shift and zero-terminal rescale: (N,) fp64.

    The shift comes first, as in CogVideoX: the rescale then ends at zero whatever the shift.
    """
    n = c.num_train_steps
    refuse(c.path_faults())
    if c.vp_schedule == "linear":
        beta = torch.linspace(c.beta_start, c.beta_end, n, dtype=torch.float64)
    elif c.vp_schedule == "scaled_linear":
        beta = torch.linspace(math.sqrt(c.beta_start), math.sqrt(c.beta_end), n, dtype=torch.float64) ** 2
    else:
        # Nichol & Dhariwal (2102.09672) eq. 17; the clip keeps the last step from erasing x in one go.
        f = torch.cos((torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    abar = shift_snr(torch.cumprod(1 - beta, 0), c.snr_shift)
    return rescale_zero_terminal_snr(abar) if c.zero_terminal_snr else abar


def shift_snr(abar: Tensor, shift: float) -> Tensor:
    """abar' = abar / (s + (1-s) abar), which is SNR' = SNR / s. Same shape as abar."""
    return abar / (shift + (1 - shift) * abar)


def rescale_zero_terminal_snr(abar: Tensor) -> Tensor:
    """Move sqrt(abar) so that the last entry is 0 and the first stays (Lin et al., algorithm 1): (N,)."""
    root = abar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def build_path(c: Diffusion) -> Path:
    """The path that the config names. ConfigError for an option that the path cannot honour."""
    refuse(c.path_faults())
    if c.path == "flow":
        return FlowPath()
    if c.path == "vp":
        return VPPath.from_alphas_bar(alphas_bar(c))
    return EDMPath(c.sigma_min, c.sigma_max)


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} is less than 1; sampling needs at least one step")
