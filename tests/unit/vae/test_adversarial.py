"""Discriminator and adversarial losses: rows are independent, and each formula is what its paper says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vidit.config import Vae, VaeTrain
from vidit.model.init import initialise
from vidit.vae.adversarial import adaptive_rows, fooled_rows, lecam_rows, r1_rows, remember, told_apart_rows, watched
from vidit.vae.autoencoder import CausalVae
from vidit.vae.discriminator import Discriminator

TINY = {
    "latent_channels": 4, "patch": 2, "base_channels": 8, "multipliers": (1, 2), "num_res_blocks": (0, 1),
    "decoder_res_blocks": (0, 1), "spatial_down": (True,), "temporal_down": (True,),
}  # fmt: skip


def judge(layers: int = 3) -> Discriminator:
    made = Discriminator(VaeTrain(adversarial_weight=1, discriminator_channels=8, discriminator_layers=layers))
    initialise(made, 1)
    return made.double().requires_grad_()


def clip(rows: int = 2, frames: int = 5, seed: int = 1) -> Tensor:
    shape = (rows, 3, frames, 32, 32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wide(made: Discriminator) -> Discriminator:
    made.dtype = torch.float64
    return made


@pytest.mark.parametrize("frames", [1, 2, 5, 17])
@pytest.mark.parametrize("layers", [1, 3, 6])
def test_every_length_and_depth_has_an_answer_for_each_patch(frames: int, layers: int) -> None:
    logits = wide(judge(layers))(clip(frames=frames))
    side = max(1, 32 // 2**layers)
    assert logits.shape[:2] == (2, 1)
    assert logits.shape[3:] == (side, side)
    assert logits.dtype == torch.float64


def test_rows_do_not_see_each_other() -> None:
    d, x = wide(judge()), clip(3)
    torch.testing.assert_close(d(x)[1:2], d(x[1:2]), rtol=1e-12, atol=1e-12)
    assert float((d(x)[0] - d(x)[1]).detach().abs().max()) > 1e-3


def test_it_computes_in_the_dtype_it_is_given() -> None:
    d = Discriminator(VaeTrain(adversarial_weight=1, discriminator_channels=8))
    initialise(d, 1)
    x = clip().float()
    full = d(x)
    d.dtype = torch.bfloat16
    half = d(x)
    assert half.dtype == torch.float32
    assert 0 < float((half - full).detach().abs().max()) < 0.1


def test_losses_at_known_logits() -> None:
    real, fake = torch.full((1, 1, 2, 2, 2), 0.25), torch.full((1, 1, 2, 2, 2), -0.5)
    assert told_apart_rows("hinge", real, fake).item() == pytest.approx(0.75 + 0.5)
    assert fooled_rows("hinge", fake).item() == pytest.approx(0.5)
    zero = torch.zeros_like(real)
    assert told_apart_rows("non_saturating", zero, zero).item() == pytest.approx(2 * 0.6931472)
    assert fooled_rows("non_saturating", zero).item() == pytest.approx(0.6931472)


def test_r1_is_the_slope_of_a_linear_judge() -> None:
    """D(x) = w x of one patch: R1 is |w|^2 / 2, and its gradient by w is w."""
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    x = torch.ones(1, 2, requires_grad=True)
    penalty = r1_rows((x * w).sum().view(1, 1), x)
    assert penalty.item() == pytest.approx(12.5)
    (slope,) = torch.autograd.grad(penalty.sum(), w)
    assert slope.tolist() == pytest.approx([3, 4])


def test_r1_reaches_the_weights_of_the_whole_judge() -> None:
    d, x = wide(judge()), clip().requires_grad_()
    r1_rows(d(x), x).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for n, p in d.named_parameters() if "bias" not in n)


def test_lecam_pulls_towards_the_average_of_the_other_side() -> None:
    real, fake = torch.full((1, 1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1, 1), -1.0)
    averages = torch.zeros(3)
    assert lecam_rows(real, fake, averages).item() == 0, "there is nothing to compare with yet"
    remember(averages, 0.5, -0.5, 0.9)
    assert (averages[:2] / averages[2]).tolist() == pytest.approx([0.5, -0.5]), "the first is no tenth of itself"
    assert lecam_rows(real, fake, averages).item() == pytest.approx(2.5**2 + 1.5**2)
    remember(averages, 1.0, -0.5, 0.9)
    assert float(averages[0] / averages[2]) == pytest.approx((0.05 * 0.9 + 0.1) / 0.19)


def test_adaptive_weight_is_the_ratio_of_gradients_of_the_last_layers_weight() -> None:
    """Against autograd on the weight itself, each row alone."""
    vae = CausalVae(Vae(**TINY))
    initialise(vae, 2)
    vae = vae.double()
    vae.dtype = torch.float64
    z = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    target = clip()
    with watched(vae.decoder.last) as seen:
        out = vae.decode(z)
    losses = [lambda x, y: (x - y).abs().flatten(1).mean(1), lambda x, y: (x * y).sin().flatten(1).mean(1)]
    slopes = [torch.autograd.grad(f(out, target).sum(), out, retain_graph=True)[0] for f in losses]
    found = adaptive_rows(vae.decoder.last, seen, out, slopes)
    for row in range(2):
        norms = []
        for f in losses:
            loss = f(vae.decode(z[row : row + 1]), target[row : row + 1]).sum()
            norms.append(torch.autograd.grad(loss, vae.decoder.last.weight)[0].norm())
        assert float(found[row]) == pytest.approx(float(norms[0] / (norms[1] + 1e-4)), rel=1e-9)
    assert not vae.decoder.last._forward_hooks, "nothing is left behind"
