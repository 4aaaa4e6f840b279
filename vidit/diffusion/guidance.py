"""What steers a denoiser from outside: classifier-free guidance (2207.12598) with rescale, and frames that are known.

g = u + s (c - u), s = 1 + w. The map is affine with weights that sum to 1, so guiding x_hat, e_hat or v is
the same thing; here it is x_hat, which is what samplers ask for. The rescale is not affine: applied to x_hat
it holds the contrast of the predicted clip itself.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vidit.diffusion.paths import Path
from vidit.diffusion.samplers import Denoise

Condition = Mapping[str, Tensor]
"""Named tensors, each with the batch in dim 0: caption features, their mask, ..."""
ConditionalDenoise = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x_t (B, ...), t_B (B,), condition) -> x_hat (B, ...)."""


def guide(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """u + s (c - u)."""
    return uncond + scale * (cond - uncond)


def guidance_rescale(guided: Tensor, cond: Tensor, strength: float) -> Tensor:
    """Pull each clip's standard deviation back to the conditional one's (Lin et al. 2305.08891 eq. 15-16).

    guided, cond: (B, ...). strength: 0 changes nothing, 1 matches the deviation in full; the paper uses 0.7.
    """
    dims = tuple(range(1, guided.ndim))
    ratio = cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (strength * ratio + (1 - strength))


def guided(
    denoise: ConditionalDenoise,
    cond: Condition,
    uncond: Condition,
    scale: float,
    *,
    rescale: float = 0.0,
    still: Condition | None = None,
    motion: float = 1.0,
) -> Denoise:
    """A denoiser for `sample` that guides from uncond towards cond, in one call on 2 B clips, uncond first.

    Motion-free guidance (GenTron, 2312.04557) adds a third pass, which comes first: n + m (u - n) + s (c - u), where
    n is of a model that does not attend through time and knows no caption.

    Args:
        denoise: the conditional denoiser.
        cond, uncond: the same names, the same shapes.
        scale: s; 1 is the plain conditional model, a call on B clips.
        rescale: strength of `guidance_rescale`.
        still: the condition of n, where `motion` is not 1.
        motion: m.
    """
    if cond.keys() != uncond.keys():
        raise ValueError(f"conditions hold {sorted(cond)} but unconditional holds {sorted(uncond)}; give the same")
    if (motion == 1) != (still is None):
        raise ValueError(f"motion={motion} needs the condition of a clip without motion (still), 1 takes none")
    parts = [part for part in (still, uncond, cond) if part is not None]
    together = {name: torch.cat([part[name] for part in parts]) for name in cond}

    def call(x: Tensor, t_B: Tensor) -> Tensor:
        if scale == 1 and motion == 1:
            return denoise(x, t_B, cond)
        n = len(parts)
        *free, u, c = denoise(torch.cat([x] * n), torch.cat([t_B] * n), together).chunk(n)
        g = guide(u, c, scale)
        if free:
            g = g + (motion - 1) * (u - free[0])
        return guidance_rescale(g, c, rescale) if rescale else g

    return call


def reconstructing(denoise: Denoise, path: Path, first: Tensor, weight: float) -> Denoise:
    """A denoiser that knows how a clip begins, of one that was not trained for it (2204.03458, section 3.1).

    The known frames x_a take the place of their estimate, so that a deterministic sampler keeps the noisy ones where
    they belong, and that of the others is x_b - (w a / 2) grad_b ||x_a - x_hat_a||^2: a backward pass for every call.

    Args:
        denoise: made of differentiable operations, guidance included.
        path: its a(t).
        first: x_a, (1 or B, C, f, H, W), the first f of the clip's frames.
        weight: w; the paper has 50 and 9.
    """
    known = first.shape[2]

    def call(x: Tensor, t_B: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            x_hat = denoise(z, t_B)
            missed = (first - x_hat[:, :, :known]).square().sum()
        (pull,) = torch.autograd.grad(missed, z)
        alpha = path.alpha(t_B).to(x_hat).reshape(-1, 1, 1, 1, 1)
        behind = (x_hat.detach() - weight / 2 * alpha * pull)[:, :, known:]
        return torch.cat((first.to(behind).expand(len(behind), -1, -1, -1, -1), behind), dim=2)

    return call
