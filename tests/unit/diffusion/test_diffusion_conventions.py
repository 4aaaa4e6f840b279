"""Flow conventions A, B, C: the same x and e must come out whichever convention a model speaks."""

import pytest
import torch

from vidit.diffusion.conventions import (
    model_from_a,
    model_to_a,
    state_from_a,
    state_to_a,
    time_from_a,
    time_to_a,
    velocity_from_a,
    velocity_to_a,
)

F64 = torch.float64
CASES = [("A", 0.0), ("B", 0.0), ("B", 1e-5), ("B", 0.1), ("C", 0.0)]
T = torch.tensor([0.0, 0.05, 0.3, 0.9, 1.0], dtype=F64)


def there(convention, s_min, x, e, t):
    """x_t and v as the table of papers.md prints them; t in the named convention."""
    t = t[:, None, None]
    if convention == "A":
        return (1 - t) * x + t * e, e - x
    if convention == "B":
        return t * x + (1 - (1 - s_min) * t) * e, x - (1 - s_min) * e
    return (1 - t) * x + t * e, x - e


def draws():
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, 3, 4, generator=g, dtype=F64)


@pytest.mark.parametrize(("convention", "s_min"), CASES)
def test_to_a_and_back(convention, s_min):
    x, e = draws()
    x_t, v = there(convention, s_min, x, e, T)
    t_a = time_to_a(T, convention, s_min)
    a = t_a[:, None, None]
    x_a, v_a = state_to_a(x_t, T, convention, s_min), velocity_to_a(v, x_t, T, convention, s_min)
    torch.testing.assert_close(x_a, (1 - a) * x + a * e)
    torch.testing.assert_close(v_a, e - x)
    torch.testing.assert_close(time_from_a(t_a, convention, s_min), T)
    torch.testing.assert_close(state_from_a(x_a, t_a, convention, s_min), x_t)
    torch.testing.assert_close(velocity_from_a(v_a, x_a, t_a, convention, s_min), v)


def test_b_without_s_min_is_a_mirrored():
    x, e = draws()
    torch.testing.assert_close(time_to_a(T, "B"), 1 - T)
    torch.testing.assert_close(velocity_to_a(x, e, T, "B"), -x)


@pytest.mark.parametrize(("convention", "s_min"), CASES)
def test_a_model_of_any_convention_serves_a(convention, s_min):
    """A model that knows x: its velocity is exact in its own convention, and must be e - x in A."""
    x, e = draws()

    def model(x_t, t_B):
        t = t_B[:, None, None]
        if convention == "B":
            noise = (x_t - t * x) / (1 - (1 - s_min) * t)
            return x - (1 - s_min) * noise
        v = (x_t - x) / t
        return v if convention == "A" else -v

    t = torch.tensor([0.1, 0.2, 0.5, 0.7, 0.95], dtype=F64)
    x_a = (1 - t[:, None, None]) * x + t[:, None, None] * e
    served = model_to_a(model, convention, s_min)
    torch.testing.assert_close(served(x_a, t), e - x)
    back = model_from_a(served, convention, s_min)
    t_there = time_from_a(t, convention, s_min)
    x_there, v_there = there(convention, s_min, x, e, t_there)
    torch.testing.assert_close(back(x_there, t_there), v_there)


def test_one_euler_step_is_the_same_in_every_convention():
    x, e = draws()
    t, dt = torch.full((5,), 0.6, dtype=F64), 0.1
    x_a, v_a = there("A", 0.0, x, e, t)
    expected = x_a - dt * v_a
    x_b, v_b = there("B", 0.0, x, e, 1 - t)
    torch.testing.assert_close(x_b + dt * v_b, expected)
    x_c, v_c = there("C", 0.0, x, e, t)
    torch.testing.assert_close(x_c + dt * v_c, expected)


def test_faults_are_refused():
    with pytest.raises(ValueError, match="A, B or C"):
        time_to_a(T, "D")
    with pytest.raises(ValueError, match="only B"):
        time_to_a(T, "C", 1e-5)
    with pytest.raises(ValueError, match="1e-5"):
        time_to_a(T, "B", -0.1)
