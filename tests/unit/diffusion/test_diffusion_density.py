"""Densities: each inverse CDF against the analytic CDF, stratification, and the published shift rules."""

import math

import pytest
import torch

from vidit.config import Diffusion
from vidit.diffusion.density import shift_for, stratified_uniform, times_from_uniform

F64 = torch.float64
U = torch.linspace(0.001, 0.999, 999, dtype=F64)
EDM = {"path": "edm", "target": "edm", "density": "log_normal"}


def normal_cdf(z):
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def cdf(c, t, shift=1.0):
    """P(time <= t), written from the definition of each density."""
    if c.path == "edm":
        return normal_cdf((t.log() - math.log(shift) - c.density_mean) / c.density_std)
    t = t / (shift - (shift - 1) * t)  # undo t' = s t / (1 + (s-1) t)
    if c.density == "uniform":
        return t
    return normal_cdf((torch.log(t / (1 - t)) - c.density_mean) / c.density_std)


CONTINUOUS = [
    Diffusion(path="flow", density="uniform"),
    Diffusion(path="flow", density="logit_normal"),
    Diffusion(path="flow", density="logit_normal", density_mean=-0.7, density_std=0.5),
    Diffusion(**EDM, density_mean=-1.2, density_std=1.2),
    Diffusion(**EDM, density_mean=0.7, density_std=1.6),
]


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.4])
@pytest.mark.parametrize("c", CONTINUOUS, ids=lambda c: f"{c.path}-{c.density}-{c.density_mean}")
def test_inverse_cdf(c, shift):
    t = times_from_uniform(c, U, shift)
    torch.testing.assert_close(cdf(c, t, shift), U)
    torch.testing.assert_close(times_from_uniform(c, U.float(), shift), t.float(), rtol=1e-4, atol=1e-6)


def test_vp_steps():
    uniform = Diffusion(path="vp", target="v", density="uniform")
    u = torch.tensor([0.0, 0.0009, 0.001001, 0.5, 0.9999999], dtype=F64)
    assert times_from_uniform(uniform, u).tolist() == [0, 0, 1, 500, 999]
    normal = Diffusion(path="vp", target="v", density="logit_normal", density_mean=0.3, density_std=0.8)
    t = times_from_uniform(normal, U)
    assert ((t >= 0) & (t <= 999) & (t == t.floor())).all()
    low, high = (cdf(normal, ((t + k) / 1000).clamp(1e-9, 1 - 1e-9)) for k in (0, 1))
    assert ((low <= U) & (high >= U)).all()


@pytest.mark.parametrize("c", CONTINUOUS, ids=lambda c: f"{c.path}-{c.density}-{c.density_mean}")
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_extremes_of_a_generator_are_safe(c, dtype):
    u = torch.tensor([0.0, 1e-30, 1 - torch.finfo(dtype).eps, 1.0], dtype=dtype)
    t = times_from_uniform(c, u, 5.0)
    assert t.isfinite().all()
    assert t.dtype == dtype
    if c.path == "edm":
        assert (t > 0).all()
    else:
        assert ((t >= 0) & (t <= 1)).all()


def test_magi_1_published_mass():
    """MAGI-1: about 70 % of training at t < 0.3 of its t = 1 is data axis (m=0, s=0.5, warp 1/3)."""
    c = Diffusion(path="flow", density="logit_normal", density_mean=0.0, density_std=0.5)
    noisy = times_from_uniform(c, U, 3.0) > 0.7
    assert 0.67 < noisy.double().mean() < 0.72


@pytest.mark.parametrize("c", CONTINUOUS, ids=lambda c: f"{c.path}-{c.density}-{c.density_mean}")
def test_stratification_puts_one_clip_in_every_stratum(c):
    n, g = 37, torch.Generator().manual_seed(0)
    for _ in range(5):
        slot = torch.randperm(n, generator=g)
        u = stratified_uniform(torch.rand(n, generator=g, dtype=F64), slot, n)
        stratum = (cdf(c, times_from_uniform(c, u, 2.0), 2.0) * n).floor().long()
        assert torch.equal(stratum, slot)


def test_stratified_uniform_is_uniform_inside_and_below_one():
    u = torch.tensor([0.0, 0.25, 0.5], dtype=F64)
    torch.testing.assert_close(
        stratified_uniform(u, torch.tensor([0, 1, 3]), 4), torch.tensor([0, 1.25 / 4, 3.5 / 4], dtype=F64)
    )
    last = stratified_uniform(torch.tensor([1 - 2**-24]), torch.tensor([511]), 512)
    assert last < 1
    with pytest.raises(ValueError, match="num_slots"):
        stratified_uniform(u, torch.tensor([0, 0, 0]), 0)
    with pytest.raises(AssertionError):
        stratified_uniform(u, torch.tensor([0, 1, 4]), 4)


def rule(shift, value=1.0, **size):
    full = {
        "tokens_per_frame": 256,
        "num_latent_frames": 1,
        "height_px": 512,
        "width_px": 512,
        "num_frames": 1,
    }
    return shift_for(Diffusion(shift=shift, shift_value=value), **{**full, **size})


def test_shift_rules():
    assert rule("none", 7.0) == 1
    assert rule("constant", 7.0) == 7
    assert rule("sqrt_pixels_frames") == 1
    sized = rule("sqrt_pixels_frames", height_px=720, width_px=1280, num_frames=102, num_latent_frames=26)
    assert sized == pytest.approx(math.sqrt(720 * 1280 / 512**2) * math.sqrt(30))
    assert rule("sqrt_pixels_frames", 2.0, num_frames=17, num_latent_frames=5) == pytest.approx(2 * 5**0.5)
    assert rule("sqrt_pixels_frames", num_frames=9, num_latent_frames=3) == pytest.approx(3**0.5)
    assert rule("linear_tokens") == 1
    assert rule("linear_tokens", tokens_per_frame=4096) == pytest.approx(3)
    middle = rule("linear_tokens", tokens_per_frame=2176, num_latent_frames=33)
    assert middle == pytest.approx(2 * math.sqrt(33))


@pytest.mark.parametrize(
    ("fields", "shift", "says"),
    [
        ({"path": "flow", "density": "log_normal"}, 1.0, "uniform logit_normal"),
        ({"path": "edm", "target": "edm", "density": "uniform"}, 1.0, "log_normal"),
        ({"path": "vp", "target": "v", "density": "uniform"}, 2.0, "snr_shift"),
    ],
)
def test_what_does_not_fit_is_refused(fields, shift, says):
    with pytest.raises(ValueError, match=says):
        times_from_uniform(Diffusion(**fields), U, shift)
