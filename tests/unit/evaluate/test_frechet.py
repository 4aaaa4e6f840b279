"""The Frechet distance, where it is known in closed form."""

from __future__ import annotations

import pytest
import torch

from vidit.evaluate.frechet import features_of, frechet_distance


def cloud(seed: int, number: int = 4000, width: int = 6) -> torch.Tensor:
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_known_distances() -> None:
    a = cloud(1)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 0.5) == pytest.approx(6 * 0.25), "only the means differ"
    spread = (2 * a - 2 * a.mean(0)) + a.mean(0)
    assert frechet_distance(a, spread) == pytest.approx(float(torch.cov(a.T).trace())), "tr(S + 4 S - 4 S)"
    b = cloud(2) @ torch.diag(torch.tensor([1.0, 2, 3, 1, 1, 0.1], dtype=torch.float64))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))


def test_the_root_of_covariances_that_do_not_commute() -> None:
    """Against the eigenvalues of the product itself, which is not symmetric."""
    a, b = cloud(1) @ cloud(3, 6), cloud(2) @ cloud(4, 6)
    product = torch.linalg.eigvals(torch.cov(a.T) @ torch.cov(b.T)).real.sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * product
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_fewer_rows_than_features_still_give_a_number() -> None:
    assert frechet_distance(cloud(1, 3), cloud(2, 3)) > 0
    with pytest.raises(ValueError, match="1 and 3 videos"):
        frechet_distance(cloud(1, 1), cloud(2, 3))


class Means:
    def video_features(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        return x_BCTHW.mean((2, 3, 4))


def test_features_of_batches() -> None:
    videos = torch.rand(5, 3, 2, 4, 4)
    found = features_of(Means(), videos.split(2))
    assert found.shape == (5, 3)
    assert found.dtype == torch.float64
