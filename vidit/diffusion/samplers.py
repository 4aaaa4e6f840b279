"""Deterministic samplers, written once for every path through a(t) and s(t).

All solve the probability-flow ODE from times[0] to times[-1], given x_hat = denoise(x_t, t):

    ddim       DDIM with eta = 0 (2010.02502 eq. 12), order 1. With sigma = s / a it is Euler on x / a.
    dpmpp_2m   DPM-Solver++(2M) (2211.01095 algorithm 2), order 2 in log(a / s) from one call a step.
    heun       EDM algorithm 2 (2206.00364) without churn, order 2, two calls a step.
    euler      Euler in the path's own clock (`Path.velocity`), order 1: x <- x - dt v on flow. This is DDIM
               on flow and edm; on vp it is Euler along the angle, whose DDIM is the exact rotation.

The ends: where a = 0 (flow at t = 1, vp with zero terminal SNR) sigma is infinite, and where s = 0 log(a / s)
is. A step that touches either end is DDIM in every sampler but euler (finite there), the limit of the
first-order forms: for Heun that is EDM's own rule at sigma = 0, for 2M the usual "last step first order".

Heun on flow and vp therefore works in sigma = s / a on x / a, as EDM does, not in the path's own time: the
trajectories are the same, its steps are large in sigma near pure noise, and its first step is DDIM.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import get_args

import torch
from torch import Tensor

from vidit.config import Sampler
from vidit.diffusion.paths import Path
from vidit.dtypes import wide

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, ...), t_B (B,)) -> x_hat (B, ...)."""


@dataclass(frozen=True)
class _Point:
    """One grid time as Python floats: coefficients are exact to fp64 whatever x's dtype."""

    t: float
    a: float
    s: float
    clock: float

    @property
    def half_log_snr(self) -> float:
        if self.a == 0 or self.s == 0:
            return -math.inf if self.a == 0 else math.inf
        return math.log(self.a) - math.log(self.s)


def _points(path: Path, times: Tensor) -> list[_Point]:
    if times.ndim != 1 or len(times) < 2 or bool((times[1:] >= times[:-1]).any()):
        raise ValueError(
            f"sampling times of shape {tuple(times.shape)} are not a falling row of at least 2; use path.sampling_times"
        )
    t = times.detach().double().cpu()
    columns = (t, path.alpha(t), path.sigma(t), path.clock(t))
    return [_Point(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


@dataclass
class _Run:
    """What every stepper needs, and the history that 2M keeps."""

    denoise: Denoise
    path: Path
    previous: tuple[Tensor, float] | None = None
    """x_hat and step length in log(a / s) of the step before (2M only)."""

    def x_hat(self, x: Tensor, point: _Point) -> Tensor:
        t_B = torch.full((len(x),), point.t, dtype=x.dtype, device=x.device)
        return self.denoise(x, t_B).to(x.dtype)


def _eps(x: Tensor, x_hat: Tensor, now: _Point) -> Tensor:
    return (x - now.a * x_hat) / now.s


def _ddim_to(x: Tensor, x_hat: Tensor, now: _Point, to: _Point) -> Tensor:
    """x_s = a_s x_hat + s_s e_hat, with e_hat written out."""
    ratio = to.s / now.s
    return ratio * x + (to.a - now.a * ratio) * x_hat


def _ddim(run: _Run, x: Tensor, now: _Point, to: _Point) -> Tensor:
    return _ddim_to(x, run.x_hat(x, now), now, to)


def _euler(run: _Run, x: Tensor, now: _Point, to: _Point) -> Tensor:
    x_hat = run.x_hat(x, now)
    t = torch.tensor(now.t, dtype=torch.float64)
    return x + (to.clock - now.clock) * run.path.velocity(x_hat, _eps(x, x_hat, now), t)


def _heun(run: _Run, x: Tensor, now: _Point, to: _Point) -> Tensor:
    """Trapezoid in sigma = s / a on y = x / a, where dy / dsigma = e_hat; multiplied through by a_to."""
    x_hat = run.x_hat(x, now)
    predicted = _ddim_to(x, x_hat, now, to)
    if now.a == 0 or to.s == 0:
        return predicted
    slope = (_eps(x, x_hat, now) + _eps(predicted, run.x_hat(predicted, to), to)) / 2
    ratio = to.a / now.a
    return ratio * x + (to.s - ratio * now.s) * slope


def _dpmpp_2m(run: _Run, x: Tensor, now: _Point, to: _Point) -> Tensor:
    """x_t = (s_t / s_s) x_s - a_t (exp(-h) - 1) D, with D extrapolated from the last two x_hat."""
    x_hat = run.x_hat(x, now)
    h = to.half_log_snr - now.half_log_snr
    data = x_hat
    # h is infinite when the step touches an end of the process: nothing to extrapolate to, or from.
    if run.previous is not None and math.isfinite(h) and math.isfinite(run.previous[1]):
        before, h_before = run.previous
        data = x_hat + (x_hat - before) * (h / (2 * h_before))
    run.previous = (x_hat, h)
    return to.s / now.s * x - to.a * math.expm1(-h) * data


_STEPS: dict[Sampler, Callable[[_Run, Tensor, _Point, _Point], Tensor]] = {
    "ddim": _ddim,
    "dpmpp_2m": _dpmpp_2m,
    "heun": _heun,
    "euler": _euler,
}


@torch.no_grad()
def sample(
    sampler: Sampler,
    denoise: Denoise,
    path: Path,
    noise: Tensor,
    times: Tensor,
) -> Tensor:
    """Carry standard normal noise to data along times.

    Args:
        sampler: ddim, dpmpp_2m, heun or euler.
        denoise: (x_t, t_B) -> x_hat; x_t like noise in fp32 (fp64 for fp64 noise), t_B (B,) likewise.
        noise: (B, ...) standard normal; `path.start` scales it to times[0].
        times: (num_steps + 1,), falling, as `path.sampling_times` gives it.

    Returns: x at times[-1], shape of noise, fp32 or noise's fp64, without gradients.
    """
    if sampler not in _STEPS:
        raise ValueError(f"unknown sampler {sampler!r}; use one of {' '.join(get_args(Sampler))}")
    points = _points(path, times)
    run, step = _Run(denoise, path), _STEPS[sampler]
    x = path.start(noise.to(wide(noise.dtype)), times[0])
    for now, to in pairwise(points):
        x = step(run, x, now, to)
    return x
