"""Guidance against closed forms for two Gaussians, and the bookkeeping around it."""

import pytest
import torch

from vidit.config import Diffusion
from vidit.diffusion.guidance import guidance_rescale, guide, guided, reconstructing
from vidit.diffusion.paths import build_path
from vidit.diffusion.samplers import sample

F64 = torch.float64
FLOW = build_path(Diffusion())
NOISE = torch.stack([-torch.ones(3, dtype=F64), torch.ones(3, dtype=F64)])
COND = {"mu": torch.tensor([[1.0, 0.0, -0.5]] * 2, dtype=F64), "var": torch.tensor([[0.3]] * 2, dtype=F64)}
UNCOND = {"mu": torch.tensor([[0.2, -0.4, 0.5]] * 2, dtype=F64), "var": torch.tensor([[0.3]] * 2, dtype=F64)}


class Denoiser:
    """Exact for N(mu, var), which arrive as the condition; remembers the sizes of its batches."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, t_B, condition):
        self.batches.append(len(x))
        a, s = FLOW.alpha(t_B)[:, None], FLOW.sigma(t_B)[:, None]
        mu, var = condition["mu"], condition["var"]
        return mu + a * var / (a**2 * var + s**2) * (x - a * mu)


def test_equal_variances_sample_the_extrapolated_mean():
    """p_c^s p_u^(1-s) of two Gaussians of one variance is a Gaussian at u + s (c - u)."""
    denoise, scale = guided(Denoiser(), COND, UNCOND, 4.0), 4.0
    low, high = sample("dpmpp_2m", denoise, FLOW, NOISE, FLOW.sampling_times(100))
    expected = UNCOND["mu"][0] + scale * (COND["mu"][0] - UNCOND["mu"][0])
    torch.testing.assert_close((low + high) / 2, expected, rtol=0, atol=2e-3)
    torch.testing.assert_close((high - low) / 2, torch.full((3,), 0.3**0.5, dtype=F64), rtol=0, atol=2e-3)


def test_score_of_the_product_of_powers():
    """The score of p_c(x_t)^s p_u(x_t)^(1-s), through Tweedie, for variances that differ."""
    other = {**UNCOND, "var": UNCOND["var"] * 3}
    x, t, scale = NOISE + 0.3, torch.full((2,), 0.6, dtype=F64), 2.5
    a, s = 0.4, 0.6
    x_hat = guided(Denoiser(), COND, other, scale)(x, t)
    score = torch.zeros_like(x)
    for condition, power in ((COND, scale), (other, 1 - scale)):
        score += -power * (x - a * condition["mu"]) / (a**2 * condition["var"] + s**2)
    torch.testing.assert_close(x_hat, (x + s**2 * score) / a)


def test_guidance_is_the_same_in_every_space():
    g = torch.Generator().manual_seed(0)
    x_t, u, c = torch.randn(3, 2, 5, generator=g, dtype=F64)
    a, s = 0.7, 0.4

    def eps(x_hat):
        return (x_t - a * x_hat) / s

    torch.testing.assert_close(eps(guide(u, c, 5.0)), guide(eps(u), eps(c), 5.0))
    torch.testing.assert_close(guide(u, c, 5.0), 5.0 * c - 4.0 * u)  # (1 + w) c - w u, w = 4


def test_one_call_does_both():
    once, t = Denoiser(), torch.full((2,), 0.5, dtype=F64)
    x_hat = guided(once, COND, UNCOND, 3.0)(NOISE, t)
    u, c = Denoiser()(NOISE, t, UNCOND), Denoiser()(NOISE, t, COND)
    torch.testing.assert_close(x_hat, u + 3 * (c - u))
    assert once.batches == [4]
    plain = Denoiser()
    torch.testing.assert_close(guided(plain, COND, UNCOND, 1.0)(NOISE, t), Denoiser()(NOISE, t, COND))
    assert plain.batches == [2]


def test_rescale():
    g = torch.Generator().manual_seed(0)
    cond, far = torch.randn(2, 3, 4, 8, 8, generator=g), 3 * torch.randn(2, 3, 4, 8, 8, generator=g)
    dims = (1, 2, 3, 4)
    torch.testing.assert_close(guidance_rescale(far, cond, 0.0), far)
    torch.testing.assert_close(guidance_rescale(far, cond, 1.0).std(dims), cond.std(dims))
    mixed = 0.7 * far * (cond.std(dims) / far.std(dims))[:, None, None, None, None] + 0.3 * far
    torch.testing.assert_close(guidance_rescale(far, cond, 0.7), mixed)
    t = torch.full((2,), 0.5, dtype=F64)
    x_hat = guided(Denoiser(), COND, UNCOND, 9.0, rescale=1.0)(NOISE, t)
    torch.testing.assert_close(x_hat.std(1), Denoiser()(NOISE, t, COND).std(1))


def test_faults_are_refused():
    with pytest.raises(ValueError, match="mu"):
        guided(Denoiser(), COND, {"mu": COND["mu"]}, 3.0)


class Moving(Denoiser):
    """Its mean is moved where the model attends through time."""

    def __call__(self, x, t_B, condition):
        return super().__call__(x, t_B, {**condition, "mu": condition["mu"] + (~condition["still"]).to(F64)[:, None]})


@pytest.mark.parametrize(("scale", "motion"), [(7.5, 1.2), (1.0, 1.3), (3.0, 1.0), (2.0, 0.0)])
def test_motion_free_guidance_is_its_formula(scale, motion):
    """e(0,0) + s [e(T,M) - e(0,M)] + m [e(0,M) - e(0,0)] of GenTron, here of x_hat."""
    still, moving = torch.tensor([True, True]), torch.tensor([False, False])
    cond, uncond = ({**part, "still": moving} for part in (COND, UNCOND))
    free = {**UNCOND, "still": still}
    denoise, x, t = Moving(), NOISE + 0.3, torch.full((2,), 0.6, dtype=F64)
    still_too = {} if motion == 1 else {"still": free}
    found = guided(denoise, cond, uncond, scale, motion=motion, **still_too)(x, t)
    assert denoise.batches == [4 if motion == 1 else 6]
    tm, om, oo = (Moving()(x, t, part) for part in (cond, uncond, free))
    torch.testing.assert_close(found, oo + scale * (tm - om) + motion * (om - oo))


def test_a_scale_of_motion_needs_its_condition():
    with pytest.raises(ValueError, match=r"motion=1\.2 needs the condition of a clip without motion"):
        guided(Denoiser(), COND, UNCOND, 2.0, motion=1.2)


@pytest.mark.parametrize(("path", "target"), [("flow", "flow"), ("vp", "v")])
def test_a_known_frame_pulls_the_other_to_its_conditional_distribution(path, target):
    """Two frames of one pixel, normal with correlation 0.9, and their exact denoiser: given that the first is 1.5, the
    second is normal with mean 1.35 and deviation 0.436. Keeping the known frame alone (w = 0) finds half that mean."""
    path, covariance = build_path(Diffusion(path=path, target=target)), torch.tensor([[1, 0.9], [0.9, 1]]).double()

    def denoise(z, t_B):
        a, s = float(path.alpha(t_B[:1])), float(path.sigma(t_B[:1]))
        gain = a * covariance @ torch.linalg.inv(a * a * covariance + s * s * torch.eye(2))
        return torch.einsum("ij,bcjhw->bcihw", gain, z)

    noise = torch.randn(4000, 1, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, found = torch.full((1, 1, 1, 1, 1), 1.5).double(), {}
    for weight in (0, 4):
        with torch.no_grad():
            steered = reconstructing(denoise, path, first, weight)
            x = sample("ddim", steered, path, noise, path.sampling_times(50)).flatten(1)
        assert (x[:, 0] == 1.5).all()
        found[weight] = x[:, 1].mean().item(), x[:, 1].std().item()
    assert found[4] == pytest.approx((1.35, 0.436), abs=0.08)
    assert found[0][0] < 0.7
