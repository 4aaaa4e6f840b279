"""Targets, conversions, weights and losses, each against the formula sheet written out by hand."""

import itertools

import pytest
import torch

from vidit.config import Diffusion
from vidit.diffusion.objective import Objective, build_objective
from vidit.diffusion.paths import build_path

F64 = torch.float64
VP = {"path": "vp", "zero_terminal_snr": False}
COMBINATIONS = [
    *[{"path": "flow", "target": target} for target in ("flow", "x", "v")],
    *[{**VP, "target": target} for target in ("eps", "x", "v")],
    *[{"path": "vp", "zero_terminal_snr": True, "target": target} for target in ("x", "v")],
    {"path": "edm", "target": "edm", "sigma_data": 0.5},
]
TIMES = {"flow": [0.05, 0.5, 0.97], "vp": [0, 400, 950], "edm": [0.01, 1.0, 40.0]}


def data(path="flow"):
    g = torch.Generator().manual_seed(0)
    x, noise, error = (torch.randn(3, 2, 3, 4, generator=g, dtype=F64) for _ in range(3))
    return x, noise, error, torch.tensor(TIMES[path], dtype=F64)


def scales(c, t):
    path = build_path(c)
    return path.alpha(t)[:, None, None, None], path.sigma(t)[:, None, None, None]


def snr_at(path, t):
    return (path.alpha(t) / path.sigma(t)) ** 2


def e_hat_of(o, x_hat, x_t, t):
    """What is left of x_t."""
    a, s = o.path.alpha(t)[:, None, None, None], o.path.sigma(t)[:, None, None, None]
    return (x_t - a * x_hat) / s


def data_weight(o, t):
    """The weight of |y - y_hat|^2 as one of |x - x_hat|^2, measured with an error of 1 in the output."""
    ones = torch.ones(len(t), 1, 1, 1, dtype=F64)
    return o.weight(t) / mse(o.denoised(ones, ones, t) - o.denoised(0 * ones, ones, t))


def mse(difference):
    return (difference**2).flatten(1).mean(1)


@pytest.mark.parametrize("fields", COMBINATIONS, ids=lambda f: "-".join(map(str, f.values())))
def test_target_and_its_inverse(fields):
    c = Diffusion(**fields)
    o, (x, noise, _, t) = build_objective(c), data(c.path)
    x_t, y = o.path.add_noise(x, noise, t), o.target(x, noise, t)
    torch.testing.assert_close(o.denoised(y, x_t, t), x)
    assert o.denoised(y.bfloat16(), x_t.float(), t).dtype == torch.float32


def test_targets_are_the_sheets():
    for name in ("flow", "vp"):
        c = Diffusion(path=name, target="v", zero_terminal_snr=False)
        x, noise, _, t = data(name)
        a, s = scales(c, t)
        path = build_path(c)
        for kind, y in {"eps": noise, "x": x, "v": a * noise - s * x, "flow": noise - x}.items():
            torch.testing.assert_close(Objective(path, kind).target(x, noise, t), y)


def test_conversions_are_the_sheets():
    """With an output that is not exact: x_hat and e_hat as the papers print them."""
    x, noise, error, t = data("vp")
    c = Diffusion(**VP, target="v")
    path, (a, s) = build_path(c), scales(c, t)
    x_t, y = a * x + s * noise, error
    expected = {
        "eps": ((x_t - s * y) / a, y),
        "x": (y, (x_t - a * y) / s),
        "v": (a * x_t - s * y, s * x_t + a * y),
    }
    for kind, (x_hat, e_hat) in expected.items():
        o = Objective(path, kind)
        torch.testing.assert_close(o.denoised(y, x_t, t), x_hat)
        torch.testing.assert_close(e_hat_of(o, o.denoised(y, x_t, t), x_t, t), e_hat)
    x, noise, error, t = data("flow")
    o, t_B111 = build_objective(Diffusion(path="flow", target="flow")), t[:, None, None, None]
    x_t = (1 - t_B111) * x + t_B111 * noise
    torch.testing.assert_close(o.denoised(error, x_t, t), x_t - t_B111 * error)


def test_error_identity():
    """|v - v_hat|^2 = (1 + SNR) |x - x_hat|^2 = |e - e_hat|^2 / a^2 (VP)."""
    x, noise, error, t = data("vp")
    c = Diffusion(**VP, target="v")
    o, (a, s) = build_objective(c), scales(c, t)
    x_t, v = a * x + s * noise, a * noise - s * x
    v_hat = v + error
    of_x, of_e = mse(x - o.denoised(v_hat, x_t, t)), mse(noise - e_hat_of(o, o.denoised(v_hat, x_t, t), x_t, t))
    snr = snr_at(o.path, t)
    torch.testing.assert_close(mse(v - v_hat), (1 + snr) * of_x)
    torch.testing.assert_close(mse(v - v_hat), of_e / a.flatten() ** 2)
    torch.testing.assert_close(o.loss(v_hat, x, noise, t), of_x / (1 - a.flatten() ** 2))  # CogVideoX's code


def test_edm_preconditioning_and_lambda():
    sd, (x, noise, error, sigma) = 0.5, data("edm")
    o = build_objective(Diffusion(path="edm", target="edm", sigma_data=sd))
    s = sigma[:, None, None, None]
    x_t = x + s * noise
    c_skip, c_out = sd**2 / (s**2 + sd**2), s * sd / torch.sqrt(s**2 + sd**2)
    torch.testing.assert_close(o.network_input(x_t, sigma), x_t / torch.sqrt(s**2 + sd**2))
    torch.testing.assert_close(o.denoised(error, x_t, sigma), c_skip * x_t + c_out * error)
    torch.testing.assert_close(o.target(x, noise, sigma), (x - c_skip * x_t) / c_out, rtol=1e-6, atol=1e-6)
    lam = (sigma**2 + sd**2) / (sigma * sd) ** 2
    torch.testing.assert_close(data_weight(o, sigma), lam)
    expected = lam * mse(o.denoised(error, x_t, sigma) - x)
    torch.testing.assert_close(o.loss(error, x, noise, sigma), expected)
    # Unit-variance input and target at every sigma, for data of deviation sd: the purpose of it all.
    many = torch.randn(2, 3, 50_000, generator=torch.Generator().manual_seed(1), dtype=F64)
    x, noise = sd * many[0], many[1]
    scaled = o.network_input(o.path.add_noise(x, noise, sigma), sigma)
    torch.testing.assert_close(scaled.std(1), torch.ones(3, dtype=F64), atol=0.02, rtol=0)
    target_std = o.target(x, noise, sigma).std(1)
    torch.testing.assert_close(target_std, torch.ones(3, dtype=F64), atol=0.02, rtol=0)


def test_network_input_is_x_t_elsewhere():
    x, _, _, t = data("flow")
    assert build_objective(Diffusion()).network_input(x, t) is x


def test_min_snr_weights():
    t, gamma = torch.tensor([20.0, 300, 900], dtype=F64), 5.0
    for kind in ("eps", "x", "v"):
        o = build_objective(Diffusion(**VP, target=kind, weighting="min_snr", min_snr_gamma=gamma))
        snr = snr_at(o.path, t)
        assert snr[0] > gamma > snr[2]  # both sides of the cap
        capped = snr.clamp(max=gamma)
        expected = {"x": capped, "eps": capped / snr, "v": capped / (snr + 1)}[kind]
        torch.testing.assert_close(o.weight(t), expected)
        torch.testing.assert_close(data_weight(o, t), capped)
    t = torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=F64)
    o = build_objective(Diffusion(path="flow", target="flow", weighting="min_snr", min_snr_gamma=gamma))
    torch.testing.assert_close(o.weight(t), torch.minimum((1 - t) ** 2, gamma * t**2))
    o = build_objective(Diffusion(path="flow", target="x", weighting="min_snr", min_snr_gamma=gamma))
    assert o.weight(t).tolist() == [gamma, gamma, 1, 0]


def test_weight_one_and_what_it_means_for_x():
    t = torch.tensor([20.0, 300, 900], dtype=F64)
    for kind in ("eps", "x", "v"):
        o = build_objective(Diffusion(**VP, target=kind))
        snr = snr_at(o.path, t)
        assert o.weight(t).tolist() == [1, 1, 1]
        torch.testing.assert_close(data_weight(o, t), {"eps": snr, "x": snr * 0 + 1, "v": snr + 1}[kind])


def test_zero_terminal_snr_v_is_finite_at_the_last_step():
    o = build_objective(Diffusion(path="vp", target="v", zero_terminal_snr=True, weighting="min_snr"))
    x, noise, _, _ = data("vp")
    t = torch.tensor([999, 999, 500])
    torch.testing.assert_close(o.target(x, noise, t)[:2], -x[:2])
    torch.testing.assert_close(o.denoised(-x, noise, t)[:2], x[:2])
    assert o.weight(t).isfinite().all()


def test_loss_weight_and_dtype():
    o = build_objective(Diffusion(path="flow", target="x", weighting="min_snr"))
    x, noise, error, t = data("flow")
    output = o.target(x, noise, t) + error
    weight = ((1 - t) / t).square().clamp(max=5.0)
    torch.testing.assert_close(o.loss(output, x, noise, t), weight * mse(error))
    loss = o.loss(output.bfloat16(), x.bfloat16(), noise.bfloat16(), t.float())
    assert loss.dtype == torch.float32
    assert loss.shape == (3,)
    per_frame = t[:, None].expand(3, 2)  # a time of its own for every index of dim 1
    torch.testing.assert_close(o.loss(error, x, noise, per_frame), o.loss(error, x, noise, t))


def test_loss_has_gradients():
    o = build_objective(Diffusion(path="flow", target="flow"))
    x, noise, error, t = data("flow")
    output = error.clone().requires_grad_()
    o.loss(output, x, noise, t).sum().backward()
    torch.testing.assert_close(output.grad, 2 * (error - (noise - x)) / x[0].numel())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"path": "vp", "target": "eps", "zero_terminal_snr": True}, "zero_terminal_snr=false"),
        ({"path": "flow", "target": "eps"}, "flow x v"),
        ({"path": "vp", "target": "flow"}, "eps x v"),
        ({"path": "edm", "target": "v"}, "one of edm"),
        ({"path": "flow", "target": "edm"}, "flow x v"),
        ({"path": "edm", "target": "edm", "weighting": "min_snr"}, "use none"),
    ],
)
def test_undefined_combinations_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        build_objective(Diffusion(**fields))


def test_every_other_combination_is_built():
    refused = 0
    for path, target, weighting in itertools.product(
        ("flow", "vp", "edm"), ("flow", "eps", "x", "v", "edm"), ("none", "min_snr")
    ):
        c = Diffusion(path=path, target=target, weighting=weighting, zero_terminal_snr=False)
        try:
            build_objective(c)
        except ValueError:
            refused += 1
    assert 30 - refused == 2 * 3 + 2 * 3 + 1
