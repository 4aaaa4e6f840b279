"""What a discriminator tells an autoencoder, and what it is told itself. Every loss is one number a row, (B,).

| name           | discriminator                            | autoencoder    | paper                    |
|----------------|------------------------------------------|----------------|--------------------------|
| hinge          | relu(1 - D(x)) + relu(1 + D(x'))         | -D(x')         | Geometric GAN 1705.02894 |
| non_saturating | softplus(-D(x)) + softplus(D(x'))        | softplus(-D(x'))| GAN 1406.2661           |

Each is a mean over patches. The weight of the autoencoder's term is the ratio of the gradients of its other losses and
of this one at the decoder's last layer (VQGAN, 2012.09841, eq. 7), here of each row by itself: a ratio over a batch
would differ with the micro-batch and with the ranks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from vidit.dtypes import wide

# VQGAN's own code: what keeps the ratio finite, and the most that it may be.
LEAST_NORM = 1e-4
MOST = 1e4


def fooled_rows(kind: str, fake: Tensor) -> Tensor:
    """The autoencoder's loss, from the logits (B, 1, T, H, W) of what it has decoded."""
    return _rows(-fake if kind == "hinge" else F.softplus(-fake))


def told_apart_rows(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss, from its logits of clips and of what was decoded of them."""
    if kind == "hinge":
        return _rows(F.relu(1 - real)) + _rows(F.relu(1 + fake))
    return _rows(F.softplus(-real)) + _rows(F.softplus(fake))


def r1_rows(real: Tensor, x_BCTHW: Tensor) -> Tensor:
    """R1 (1801.04406, eq. 9): the squared gradient of a patch's logit by the real clip, in the mean over patches.

    Patches see mostly different pixels, so the gradient of their sum is squared and shared among them.
    """
    (slope,) = torch.autograd.grad(real.sum(), x_BCTHW, create_graph=True)
    return 0.5 * slope.square().flatten(1).sum(1) / real[0].numel()


def lecam_rows(real: Tensor, fake: Tensor, averages: Tensor) -> Tensor:
    """LeCAM (2104.03310), one-sided as its authors compute it: how far an answer is beyond the mean one to the others.

    `averages` as in `Discriminator`; 0 before there are any.
    """
    of_real, of_fake = averages[:2] / averages[2].clamp(min=1e-12)
    there = (averages[2] > 0).to(real.dtype)
    return there * (_rows(F.relu(real - of_fake).square()) + _rows(F.relu(of_real - fake).square()))


@torch.no_grad()
def remember(averages: Tensor, real: float, fake: float, decay: float) -> None:
    """Fold the mean logits of a step into LeCAM's averages."""
    new = torch.tensor([real, fake, 1.0], dtype=averages.dtype, device=averages.device)
    averages.lerp_(new, 1 - decay)


class Seen:
    """Input and output of a layer in its last call."""

    input: Tensor
    output: Tensor


@contextmanager
def watched(layer: nn.Module) -> Iterator[Seen]:
    """While entered, what goes in and out of the layer is kept."""
    seen = Seen()

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.input, seen.output = args[0].detach(), output

    handle = layer.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def adaptive_rows(layer: nn.Module, seen: Seen, pixels: Tensor, slopes: Sequence[Tensor]) -> Tensor:
    """Eq. 7 of each row: the norm of the weight's first gradient by that of the second.

    Args:
        layer: the decoder's last convolution, with what `watched` saw of it.
        pixels: what the decoder made of the layer's output.
        slopes: gradients of two losses by the pixels; rows are independent.
    """
    by_output = [torch.autograd.grad(pixels, seen.output, slope, retain_graph=True)[0] for slope in slopes]
    norms = [_weight_norms(layer, seen.input, slope) for slope in by_output]
    return (norms[0] / (norms[1] + LEAST_NORM)).clamp(max=MOST)


def _weight_norms(layer: nn.Module, x: Tensor, slope: Tensor) -> Tensor:
    """(B,): norms of each row's gradient of the weight.

    A layer is linear in its weight, so the gradient needs none: zeros stand in for one that may be divided over ranks.
    """
    assert isinstance(layer.weight, Tensor)
    weight = torch.zeros(layer.weight.shape, dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(weight.shape[0], dtype=x.dtype, device=x.device)
    norms = []
    for row, row_slope in zip(x.split(1), slope.split(1), strict=True):
        out = functional_call(layer, {"weight": weight, "bias": bias}, (row,))
        (gradient,) = torch.autograd.grad(out, weight, row_slope)
        norms.append(torch.linalg.vector_norm(gradient, dtype=wide(gradient.dtype)))
    return torch.stack(norms)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)
