"""Forward processes: their scales against the papers' formulas, their ends, their sampling grids."""

import math

import pytest
import torch

from vidit.config import Diffusion
from vidit.diffusion.paths import alphas_bar, build_path, rescale_zero_terminal_snr, shift_snr, shift_time

F64 = torch.float64


def vp(**changes):
    return Diffusion(**{"path": "vp", "target": "v", "zero_terminal_snr": False, **changes})


def t64(*values):
    return torch.tensor(values, dtype=F64)


def test_flow_scales():
    path, t = build_path(Diffusion(path="flow")), t64(0.1, 0.5, 0.8)
    torch.testing.assert_close(path.alpha(t), 1 - t)
    torch.testing.assert_close(path.sigma(t), t)
    torch.testing.assert_close(path.time_embedding_input(t), t64(100, 500, 800))
    assert path.zero_terminal_snr


def test_edm_scales():
    path, t = build_path(Diffusion(path="edm", target="edm")), t64(0.1, 1.0, 50.0)
    torch.testing.assert_close(path.alpha(t), torch.ones(3, dtype=F64))
    torch.testing.assert_close(path.sigma(t), t)
    torch.testing.assert_close(path.time_embedding_input(t), 1000 * t.log() / 4)  # 1000 c_noise
    assert path.time_embedding_input(t64(0.0)).isfinite().all()
    assert not path.zero_terminal_snr


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_vp_schedules(schedule):
    c = vp(vp_schedule=schedule, beta_start=0.00085, beta_end=0.012)
    abar, n = alphas_bar(c), 1000
    if schedule == "cosine":

        def f(i):
            return math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2

        expected = t64(*[f(i + 1) / f(0) for i in range(n - 1)])
        torch.testing.assert_close(abar[:-1], expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(abar[-1] / abar[-2], t64(0.001)[0])  # the clipped last beta
    else:
        product, expected = 1.0, []
        for i in range(n):
            w = i / (n - 1)
            if schedule == "linear":
                beta = 0.00085 + w * (0.012 - 0.00085)
            else:
                beta = (0.00085**0.5 + w * (0.012**0.5 - 0.00085**0.5)) ** 2
            product *= 1 - beta
            expected.append(product)
        torch.testing.assert_close(abar, t64(*expected), rtol=1e-12, atol=0)
    path = build_path(c)
    steps = torch.arange(n)
    a, s = path.alpha(steps.double()), path.sigma(steps.double())
    torch.testing.assert_close(a**2, abar)
    torch.testing.assert_close(a**2 + s**2, torch.ones(n, dtype=F64))
    torch.testing.assert_close(path.alpha(steps), a.float())  # integer steps are the same table
    torch.testing.assert_close(path.time_embedding_input(steps.double()), steps.double())


def test_zero_terminal_snr_rescale():
    plain, rescaled = alphas_bar(vp()), alphas_bar(vp(zero_terminal_snr=True))
    root_0, root_last = plain[0].sqrt(), plain[-1].sqrt()
    expected = (plain.sqrt() - root_last) * root_0 / (root_0 - root_last)
    torch.testing.assert_close(rescaled.sqrt(), expected)
    assert rescaled[-1] == 0
    torch.testing.assert_close(rescaled[0], plain[0])
    assert (rescaled.diff() < 0).all()
    path = build_path(vp(zero_terminal_snr=True))
    assert path.zero_terminal_snr
    assert not build_path(vp()).zero_terminal_snr
    assert path.alpha(torch.tensor([999])) == 0
    assert path.sigma(torch.tensor([999])) == 1
    torch.testing.assert_close(rescale_zero_terminal_snr(rescaled), rescaled)


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_snr_shift_divides_the_snr(shift):
    plain, shifted = alphas_bar(vp()), alphas_bar(vp(snr_shift=shift))
    torch.testing.assert_close(shifted / (1 - shifted), plain / (1 - plain) / shift)
    both = alphas_bar(vp(snr_shift=shift, zero_terminal_snr=True))
    torch.testing.assert_close(both, rescale_zero_terminal_snr(shift_snr(plain, shift)))  # CogVideoX's order


def test_vp_between_steps_is_on_the_circle_and_finite_at_both_ends():
    path = build_path(vp(zero_terminal_snr=True))
    t = torch.linspace(-1, 999, 4001, dtype=F64)
    a, s = path.alpha(t), path.sigma(t)
    torch.testing.assert_close(a**2 + s**2, torch.ones_like(t))
    assert (a.diff() < 0).all()
    assert (s.diff() > 0).all()
    assert (a[0], s[0], a[-1], s[-1]) == (1, 0, 0, 1)
    torch.testing.assert_close(path.clock(t64(-1, 999)), t64(0, math.pi / 2))
    torch.testing.assert_close(torch.cos(path.clock(t)), a)


@pytest.mark.parametrize("c", [Diffusion(), vp(), Diffusion(path="edm", target="edm")], ids=lambda c: c.path)
def test_add_noise_per_clip_and_per_latent_frame(c):
    path = build_path(c)
    times = {"flow": t64(0.2, 0.9), "vp": t64(3, 800), "edm": t64(0.05, 7)}[c.path]
    x, noise = torch.randn(2, 3, 2, 4, 4, dtype=F64), torch.randn(2, 3, 2, 4, 4, dtype=F64)
    a, s = path.alpha(times), path.sigma(times)
    for b in range(2):
        torch.testing.assert_close(path.add_noise(x, noise, times)[b], a[b] * x[b] + s[b] * noise[b])
    per_frame = path.add_noise(x, noise, times[None, None].expand(2, 1, 2))
    torch.testing.assert_close(per_frame[:, :, 1], a[1] * x[:, :, 1] + s[1] * noise[:, :, 1])
    assert path.add_noise(x.bfloat16(), noise.bfloat16(), times).dtype == torch.float32
    assert path.add_noise(x, noise, times.float()).dtype == F64


def test_velocity_is_the_derivative_of_the_path_in_its_clock():
    x, noise = torch.randn(1, 5, dtype=F64), torch.randn(1, 5, dtype=F64)
    for c, t in ((Diffusion(), 0.4), (vp(), 500.0), (Diffusion(path="edm", target="edm"), 2.0)):
        path, eps = build_path(c), 1e-5
        low, high = t64(t), t64(t + eps)
        slope = path.add_noise(x, noise, high) - path.add_noise(x, noise, low)
        slope = slope / (path.clock(high) - path.clock(low))
        torch.testing.assert_close(path.velocity(x, noise, low), slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [0.1, 1.0, 3.0, 7.3])
def test_flow_sampling_times(shift):
    times = build_path(Diffusion()).sampling_times(10, shift)
    t = torch.arange(10, -1, -1, dtype=F64) / 10
    torch.testing.assert_close(times, shift * t / (1 + (shift - 1) * t))
    assert (times[0], times[-1]) == (1, 0)
    snr_fall = torch.log((1 - t) / t)[1:-1] - torch.log((1 - times) / times)[1:-1]
    torch.testing.assert_close(2 * snr_fall, torch.full((9,), 2 * math.log(shift), dtype=F64))
    # Convention B writes the same map as t / (s - (s-1) t).
    torch.testing.assert_close(1 - shift_time(1 - t, shift), t / (shift - (shift - 1) * t))


def test_vp_sampling_times_are_trailing():
    path = build_path(vp(zero_terminal_snr=True))
    # Lin et al. table 2: T = 1000, 5 steps.
    assert path.sampling_times(5).tolist() == [999, 799, 599, 399, 199, -1]
    assert path.sampling_times(7)[:3].tolist() == [999, 856, 713]
    assert path.sampling_times(1000).tolist() == list(range(999, -2, -1))
    with pytest.raises(ValueError, match="at most 1000"):
        path.sampling_times(1001)
    with pytest.raises(ValueError, match="snr_shift"):
        path.sampling_times(10, 3.0)


def test_edm_sampling_times():
    path, n = build_path(Diffusion(path="edm", target="edm", sigma_min=0.002, sigma_max=80.0)), 18
    expected = [(80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(n)]
    torch.testing.assert_close(path.sampling_times(n), t64(*expected, 0))
    torch.testing.assert_close(path.sampling_times(n, 2.0), t64(*expected, 0) * 2)
    torch.testing.assert_close(path.sampling_times(1), t64(80, 0))


def test_shift_means_the_same_on_flow_and_edm():
    t = t64(0.2, 0.5, 0.9)
    shifted = shift_time(t, 4.0)
    torch.testing.assert_close(shifted / (1 - shifted), 4 * t / (1 - t))


def test_faults_are_refused():
    with pytest.raises(ValueError, match="snr_shift"):
        build_path(vp(shift="constant", shift_value=3.0))
    with pytest.raises(ValueError, match="sigma_max"):
        build_path(Diffusion(path="edm", target="edm", sigma_min=3.0, sigma_max=2.0))
    with pytest.raises(ValueError, match="beta_end"):
        build_path(vp(beta_start=0.02, beta_end=0.01))
    with pytest.raises(ValueError, match="at least one"):
        build_path(Diffusion()).sampling_times(0)
    with pytest.raises(ValueError, match="999"):
        build_path(vp()).alpha(torch.tensor([999.0], dtype=torch.bfloat16))
