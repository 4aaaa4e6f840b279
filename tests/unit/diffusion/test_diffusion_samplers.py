"""Samplers on Gaussian data N(mu, diag S), where the exact denoiser and the exact ODE map are closed forms.

    E[x | x_t] = mu + a S / (a^2 S + s^2) (x_t - a mu)
    x_to = a_to mu + sqrt((a_to^2 S + s_to^2) / (a^2 S + s^2)) (x_t - a mu)

Every sampler is affine in the noise, so noise = -1 and +1 give the mean and deviation of its output exactly.
"""

import math
from itertools import pairwise

import pytest
import torch

from vidit.config import Diffusion
from vidit.diffusion.paths import VPPath, build_path
from vidit.diffusion.samplers import sample

F64 = torch.float64
MU = torch.tensor([0.4, -1.0, 0.0], dtype=F64)
S = torch.tensor([0.2, 1.0, 2.0], dtype=F64)
PATHS = {
    "flow": Diffusion(path="flow"),
    "vp": Diffusion(path="vp", target="v", zero_terminal_snr=False),
    "ztsnr": Diffusion(path="vp", target="v", zero_terminal_snr=True),
    "edm": Diffusion(path="edm", target="edm"),
}
SAMPLERS = ["ddim", "euler", "dpmpp_2m", "heun"]
BOTH = torch.stack([-torch.ones(3, dtype=F64), torch.ones(3, dtype=F64)])


def path_of(name):
    return build_path(PATHS[name])


def exact_denoiser(path, mu=MU, var=S):
    def denoise(x, t_B):
        a, s = path.alpha(t_B)[:, None], path.sigma(t_B)[:, None]
        return mu + a * var / (a**2 * var + s**2) * (x - a * mu)

    return denoise


def exact_map(path, x, t, to):
    (a, a_to), (s, s_to) = path.alpha(torch.stack([t, to])), path.sigma(torch.stack([t, to]))
    return a_to * MU + torch.sqrt((a_to**2 * S + s_to**2) / (a**2 * S + s**2)) * (x - a * MU)


def interior_grid(name, num_steps):
    """Grids that touch neither end, halved exactly when num_steps doubles."""
    w = torch.linspace(0, 1, num_steps + 1, dtype=F64)
    if name == "flow":
        return 0.95 - 0.9 * w
    if name == "edm":
        return 20 * (0.05 / 20) ** w
    return 970 - 960 * w


def error_on(name, sampler, times):
    path = path_of(name)
    x = sample(sampler, exact_denoiser(path), path, BOTH, times)
    exact = exact_map(path, path.start(BOTH, times[0]), times[0], times[-1])
    return float((x - exact).abs().max())


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_order_of_convergence(name, sampler):
    errors = [error_on(name, sampler, interior_grid(name, n)) for n in (60, 120)]
    order = math.log2(errors[0] / errors[1])
    if sampler in ("ddim", "euler"):
        assert 0.9 < order < 1.15, errors
    else:
        assert 1.8 < order < 2.4, errors
        assert errors[-1] < 4e-3


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_becomes_data(name, sampler):
    """Full grids, both ends included: mean and deviation of the samples, closer with more steps."""
    path = path_of(name)
    errors = []
    for num_steps in (10, 30, 100):
        times = path.sampling_times(num_steps)
        low, high = sample(sampler, exact_denoiser(path), path, BOTH, times)
        # Pure noise is the path's own distribution only where a = 0: else the ODE map keeps the difference.
        exact_low, exact_high = exact_map(path, path.start(BOTH, times[0]), times[0], times[-1])
        mean, std = (low + high) / 2, (high - low) / 2
        exact_mean, exact_std = (exact_low + exact_high) / 2, (exact_high - exact_low) / 2
        leftover = 1e-12 if path.zero_terminal_snr else 0.03
        torch.testing.assert_close(exact_mean, MU, rtol=0, atol=leftover)
        torch.testing.assert_close(exact_std, S.sqrt(), rtol=0, atol=leftover)
        errors.append(float(torch.cat([mean - exact_mean, std - exact_std]).abs().max()))
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 2
    assert errors[2] < (0.04 if sampler in ("ddim", "euler") else 2e-3), errors


@pytest.mark.parametrize("shift", [0.5, 3.0])
@pytest.mark.parametrize("name", ["flow", "edm"])
def test_shifted_grids_reach_the_same_data(name, shift):
    path = path_of(name)
    low, high = sample("heun", exact_denoiser(path), path, BOTH, path.sampling_times(100, shift))
    torch.testing.assert_close((high - low) / 2, S.sqrt(), rtol=0, atol=0.01)
    torch.testing.assert_close((high + low) / 2, MU, rtol=0, atol=0.03)


def trace(sampler, name, times):
    """The x after every step of a sampler that calls the denoiser once a step."""
    path, seen = path_of(name), []
    denoise = exact_denoiser(path)

    def watched(x, t_B):
        seen.append(x)
        return denoise(x, t_B)

    last = sample(sampler, watched, path, BOTH, times)
    assert len(seen) == len(times) - 1
    return torch.stack([*seen[1:], last])


@pytest.mark.parametrize("name", PATHS)
def test_first_order_dpmpp_is_ddim(name):
    """2M is first order in its first step, where it touches a = 0 or s = 0, and just after a = 0."""
    path = path_of(name)
    for num_steps in (1, 2):
        times = path.sampling_times(num_steps)
        torch.testing.assert_close(trace("dpmpp_2m", name, times), trace("ddim", name, times))
    times = path.sampling_times(6)
    difference = (trace("dpmpp_2m", name, times) - trace("ddim", name, times)).abs().amax((1, 2))
    first_order = 2 if path.zero_terminal_snr else 1
    assert (difference[:first_order] < 1e-12).all()
    assert (difference[first_order:] > 1e-4).all()


@pytest.mark.parametrize("name", PATHS)
def test_euler_is_ddim_where_the_path_is_straight(name):
    times = path_of(name).sampling_times(7)
    euler, ddim = trace("euler", name, times), trace("ddim", name, times)
    if name in ("flow", "edm"):
        torch.testing.assert_close(euler, ddim)
    else:
        assert (euler - ddim).abs().max() > 1e-3


def test_euler_on_flow_is_one_line():
    path, x = path_of("flow"), BOTH.clone()
    times, denoise = path.sampling_times(9, 3.0), exact_denoiser(path_of("flow"))
    for t, to in pairwise(times):
        v = (x - denoise(x, t.expand(2))) / t
        x = x - (t - to) * v
    torch.testing.assert_close(sample("euler", denoise, path, BOTH, times), x)


def test_ddim_on_vp_is_a_rotation_and_euler_its_tangent():
    path = path_of("ztsnr")
    denoise, times = exact_denoiser(path), torch.tensor([700.0, 500.0], dtype=F64)
    (a, _), (s, _) = path.alpha(times), path.sigma(times)
    x_hat = denoise(BOTH, times[:1].expand(2))
    v = a * (BOTH - a * x_hat) / s - s * x_hat
    delta = path.clock(times[0]) - path.clock(times[1])
    rotated = torch.cos(delta) * BOTH - torch.sin(delta) * v
    torch.testing.assert_close(sample("ddim", denoise, path, BOTH, times), rotated)
    torch.testing.assert_close(sample("euler", denoise, path, BOTH, times), BOTH - delta * v)


@pytest.mark.parametrize("name", PATHS)
def test_dpmpp_2m_is_the_sheets(name):
    path, times = path_of(name), interior_grid(name, 6)
    denoise = exact_denoiser(path)
    a, s = path.alpha(times), path.sigma(times)
    lam, x, previous = torch.log(a / s), path.start(BOTH, times[0]), None
    for i in range(6):
        x_hat, h = denoise(x, times[i].expand(2)), lam[i + 1] - lam[i]
        data = x_hat
        if previous is not None:
            r = (lam[i] - lam[i - 1]) / h
            data = (1 + 1 / (2 * r)) * x_hat - 1 / (2 * r) * previous
        x = s[i + 1] / s[i] * x - a[i + 1] * (torch.exp(-h) - 1) * data
        previous = x_hat
    torch.testing.assert_close(sample("dpmpp_2m", denoise, path, BOTH, times), x)


def test_heun_is_edm_algorithm_2():
    path = path_of("edm")
    denoise, sigma = exact_denoiser(path), path.sampling_times(8)
    x = BOTH * sigma[0]
    for i in range(8):
        d = (x - denoise(x, sigma[i].expand(2))) / sigma[i]
        x_next = x + (sigma[i + 1] - sigma[i]) * d
        if sigma[i + 1] > 0:
            d_next = (x_next - denoise(x_next, sigma[i + 1].expand(2))) / sigma[i + 1]
            x_next = x + (sigma[i + 1] - sigma[i]) * (d + d_next) / 2
        x = x_next
    torch.testing.assert_close(sample("heun", denoise, path, BOTH, sigma), x)


def test_heun_does_not_depend_on_the_path_it_is_written_on():
    """The same sigma = s / a grid on flow and on edm gives the same data, as Heun works in sigma on x / a."""
    flow, edm = path_of("flow"), path_of("edm")
    sigma = torch.tensor([20.0, 5, 1, 0.2, 0], dtype=F64)
    t = sigma / (1 + sigma)
    on_edm = sample("heun", exact_denoiser(edm), edm, BOTH, sigma)
    on_flow = sample("heun", exact_denoiser(flow), flow, BOTH, t)  # starts from t noise = (1 - t) sigma noise
    torch.testing.assert_close(on_flow, on_edm)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_few_steps_and_low_precision_are_finite(name, sampler):
    path = path_of(name)
    for num_steps in (1, 2, 3):
        times = path.sampling_times(num_steps)
        x = sample(sampler, exact_denoiser(path), path, BOTH, times)
        assert x.isfinite().all()
        if num_steps == 1 and path.zero_terminal_snr and sampler != "euler":
            torch.testing.assert_close(x, MU.expand(2, 3))  # E[x | pure noise]
    times = path.sampling_times(20)
    rough = sample(sampler, exact_denoiser(path, MU.float(), S.float()), path, BOTH.bfloat16(), times)
    assert rough.dtype == torch.float32
    fine = sample(sampler, exact_denoiser(path), path, BOTH, times)
    torch.testing.assert_close(rough, fine.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("sampler", "name", "calls"),
    [
        ("ddim", "flow", 5),
        ("dpmpp_2m", "ztsnr", 5),
        ("euler", "edm", 5),
        ("heun", "edm", 9),
        ("heun", "flow", 8),
    ],
)
def test_calls_and_gradients(sampler, name, calls):
    path, weight, count = path_of(name), torch.ones(1, requires_grad=True), []
    denoise = exact_denoiser(path)

    def counted(x, t_B):
        assert t_B.shape == (2,)
        assert t_B.dtype == x.dtype
        count.append(t_B)
        return denoise(x, t_B) * weight

    x = sample(sampler, counted, path, BOTH, path.sampling_times(5))
    assert len(count) == calls
    assert not x.requires_grad


def test_the_start_is_scaled_to_the_path():
    for name in PATHS:
        path = path_of(name)
        start = path.start(BOTH, path.sampling_times(4)[0])
        torch.testing.assert_close(start, BOTH * (80.0 if name == "edm" else 1.0))


def test_a_custom_table_and_faults():
    path = VPPath.from_alphas_bar(torch.tensor([0.9, 0.5, 0.0], dtype=F64))
    x = sample("ddim", exact_denoiser(path), path, BOTH, path.sampling_times(3))
    assert x.isfinite().all()
    with pytest.raises(ValueError, match="dpmpp_2m"):
        sample("plms", exact_denoiser(path), path, BOTH, path.sampling_times(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sampling_times"):
        sample("ddim", exact_denoiser(path), path, BOTH, path.sampling_times(3).flip(0))
