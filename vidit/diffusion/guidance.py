"""Classifier-free guidance (2207.12598) around any conditional denoiser, with interval and rescale.

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


def guide(uncond: Tensor, cond: Tensor, scale: float | Tensor) -> Tensor:
    """u + s (c - u); a tensor scale broadcasts (SVD ramps it along the latent frames)."""
    return uncond + scale * (cond - uncond)


def guidance_rescale(guided: Tensor, cond: Tensor, strength: float) -> Tensor:
    """Pull each clip's standard deviation back to the conditional one's (Lin et al. 2305.08891 eq. 15-16).

    guided, cond: (B, ...). strength: 0 changes nothing, 1 matches the deviation in full; the paper uses 0.7.
    """
    dims = tuple(range(1, guided.ndim))
    ratio = cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (strength * ratio + (1 - strength))


def log_snr_interval(path: Path, low: float, high: float) -> Callable[[float], bool]:
    """Guide where low <= log SNR(t) <= high (Kynkaanniemi et al. 2404.07724); log SNR = 2 log(a / s)."""
    if low > high:
        raise ValueError(f"guidance interval from log-SNR {low} to {high} is empty; give the smaller one first")
    return lambda t: low <= float(path.log_snr(torch.tensor(t, dtype=torch.float64))) <= high


def step_interval(times: Tensor, first: float, last: float) -> Callable[[float], bool]:
    """Guide in steps i with first <= i / num_steps < last, fractions of the grid times (num_steps + 1,)."""
    if not 0 <= first < last <= 1:
        raise ValueError(f"guidance interval [{first}, {last}) of the steps is not 0 <= first < last <= 1")
    grid = times.detach().double().cpu()[:-1]

    def active(t: float) -> bool:
        # The nearest grid time, because the sampler hands t over in the dtype of x.
        step = int((grid - t).abs().argmin())
        return first <= step / len(grid) < last

    return active


def guided(
    denoise: ConditionalDenoise,
    cond: Condition,
    uncond: Condition,
    scale: float | Tensor,
    *,
    active: Callable[[float], bool] | None = None,
    batched: bool = True,
    rescale: float = 0.0,
) -> Denoise:
    """A denoiser for `sample` that guides from uncond towards cond.

    Args:
        denoise: the conditional denoiser.
        cond, uncond: the same names, the same shapes.
        scale: s; 1 is the plain conditional model, at the price of one call.
        active: tells from t whether to guide (`log_snr_interval`, `step_interval`); elsewhere s = 1.
        batched: one call on 2 B clips (uncond first) rather than two calls on B: faster, twice the memory.
        rescale: strength of `guidance_rescale`.
    """
    if cond.keys() != uncond.keys():
        raise ValueError(f"conditions hold {sorted(cond)} but unconditional holds {sorted(uncond)}; give the same")
    plain = isinstance(scale, (int, float)) and scale == 1

    def both(x: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        if not batched:
            return denoise(x, t_B, uncond), denoise(x, t_B, cond)
        pair = {name: torch.cat([uncond[name], cond[name]]) for name in cond}
        u, c = denoise(torch.cat([x, x]), torch.cat([t_B, t_B]), pair).chunk(2)
        return u, c

    def call(x: Tensor, t_B: Tensor) -> Tensor:
        # All clips of a sampling step share one time.
        if plain or (active is not None and not active(float(t_B[0]))):
            return denoise(x, t_B, cond)
        u, c = both(x, t_B)
        g = guide(u, c, scale)
        return guidance_rescale(g, c, rescale) if rescale else g

    return call
