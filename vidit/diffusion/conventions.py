"""The three rectified-flow conventions in the wild, converted to and from ours (A) at the border.

    A: t = 1 is noise   x_t = (1-t) x + t e             v = e - x            SD3, HunyuanVideo, diffusers
    B: t = 1 is data    x_t = t x + (1 - k t) e         v = x - k e          Movie Gen, Wan, Step-Video, Goku
    C: t = 1 is noise   as A                            v = x - e            Open-Sora 1.2

with k = 1 - s_min (s_min = 1e-5 in Movie Gen, 0 in Goku). With s_min > 0 the scales of B sum to
c = 1 + s_min t rather than to 1, so a state of B is c times the state of A with x and e in the same ratio:

    t_A = (1 - k t_B) / c       x_A = x_B / c       v_A = s_min x_B - c v_B

The last follows from e = x_B - t_B v_B and x = k x_B + (1 - k t_B) v_B. With s_min = 0 that is t_A = 1 - t_B
and v_A = -v_B.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from vidit.diffusion.paths import expand

Convention = Literal["A", "B", "C"]
Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, ...), t_B (B,)) -> v (B, ...)."""


def _check(convention: str, s_min: float) -> None:
    if convention not in ("A", "B", "C"):
        raise ValueError(f"unknown flow convention {convention!r}; use A, B or C")
    if s_min and convention != "B":
        raise ValueError(f"s_min={s_min} has no effect in convention {convention}; only B has it, leave it at 0")
    if not 0 <= s_min < 1:
        raise ValueError(f"s_min={s_min} is not in [0, 1); Movie Gen uses 1e-5")


def time_to_a(t: Tensor, convention: Convention, s_min: float = 0.0) -> Tensor:
    """The time in A of time t in the named convention; same shape."""
    _check(convention, s_min)
    return (1 - (1 - s_min) * t) / (1 + s_min * t) if convention == "B" else t


def time_from_a(t: Tensor, convention: Convention, s_min: float = 0.0) -> Tensor:
    """Inverse of `time_to_a`."""
    _check(convention, s_min)
    return (1 - t) / (1 - s_min + s_min * t) if convention == "B" else t


def _scale(t: Tensor, x: Tensor, convention: Convention, s_min: float) -> Tensor:
    """c: the sum of the two scales of x_t at time t of the named convention, broadcast against x."""
    _check(convention, s_min)
    return expand(1 + s_min * t, x)


def state_to_a(x_t: Tensor, t: Tensor, convention: Convention, s_min: float = 0.0) -> Tensor:
    """x_t of A from x_t (B, ...) and t, both in the named convention."""
    return x_t / _scale(t, x_t, convention, s_min)


def state_from_a(x_t: Tensor, t: Tensor, convention: Convention, s_min: float = 0.0) -> Tensor:
    """x_t of the named convention from x_t (B, ...) and t, both in A."""
    return x_t * _scale(time_from_a(t, convention, s_min), x_t, convention, s_min)


def velocity_to_a(v: Tensor, x_t: Tensor, t: Tensor, convention: Convention, s_min: float = 0.0) -> Tensor:
    """v = e - x from v, x_t (B, ...) and t, all three in the named convention."""
    _check(convention, s_min)
    return v if convention == "A" else s_min * x_t - _scale(t, x_t, convention, s_min) * v


def velocity_from_a(v: Tensor, x_t: Tensor, t: Tensor, convention: Convention, s_min: float = 0.0) -> Tensor:
    """The named convention's v from v, x_t (B, ...) and t, all three in A."""
    _check(convention, s_min)
    if convention == "A":
        return v
    x_there = state_from_a(x_t, t, convention, s_min)
    return (s_min * x_there - v) / _scale(time_from_a(t, convention, s_min), x_t, convention, s_min)


def model_to_a(model: Velocity, convention: Convention, s_min: float = 0.0) -> Velocity:
    """A velocity model of the named convention as a model of A: state, time and output converted."""
    _check(convention, s_min)

    def velocity(x_t: Tensor, t_B: Tensor) -> Tensor:
        x_there, t_there = state_from_a(x_t, t_B, convention, s_min), time_from_a(t_B, convention, s_min)
        return velocity_to_a(model(x_there, t_there), x_there, t_there, convention, s_min)

    return velocity


def model_from_a(model: Velocity, convention: Convention, s_min: float = 0.0) -> Velocity:
    """A velocity model of A as a model of the named convention: what another system's sampler can call."""
    _check(convention, s_min)

    def velocity(x_t: Tensor, t_B: Tensor) -> Tensor:
        x_a, t_a = state_to_a(x_t, t_B, convention, s_min), time_to_a(t_B, convention, s_min)
        return velocity_from_a(model(x_a, t_a), x_a, t_a, convention, s_min)

    return velocity
