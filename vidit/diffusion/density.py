"""From which noise levels a model learns: densities over t, stratification, and shift with size and length.

Every density is the inverse of its CDF applied to a uniform number, so whatever makes the uniform numbers
more even (one stratum per clip of the global batch) makes the times more even, for every density alike.
The randomness itself, keyed by clip, is the caller's.
"""

import math

import torch
from torch import Tensor

from vidit.config import Diffusion, refuse
from vidit.diffusion.paths import shift_time


def stratified_uniform(u_B: Tensor, slot_B: Tensor, num_slots: int) -> Tensor:
    """One stratum per clip: (slot + u) / num_slots, in u's shape and dtype, below 1.

    CogVideoX's explicit uniform sampling (2408.06072, section 3.3) with one interval per clip rather than per
    group of ranks, so that it does not depend on the layout. slot_B: the clip's place in the global batch,
    0 .. num_slots-1, integers.
    """
    if num_slots < 1:
        raise ValueError(f"num_slots={num_slots} is less than 1; give the number of clips in the global batch")
    assert bool(((slot_B >= 0) & (slot_B < num_slots)).all()), f"a slot lies outside 0..{num_slots - 1}"
    largest = 1 - torch.finfo(u_B.dtype).eps  # the last stratum may otherwise round up to 1
    return ((slot_B + u_B.double()) / num_slots).to(u_B.dtype).clamp(max=largest)


def times_from_uniform(c: Diffusion, u_B: Tensor, shift: float = 1.0) -> Tensor:
    """Inverse CDF of the configured density at u in [0, 1), then the shift: times of c.path, like u_B.

    flow: t in [0, 1]; vp: whole training steps 0 .. N-1; edm: sigma > 0. Convention A: a larger u, a larger
    density_mean and a larger shift all mean more noise. ValueError where path, density and shift do not fit.
    """
    refuse(c.density_faults())
    if c.path == "vp" and shift != 1:
        raise ValueError(f"shift={shift} has no meaning on a table of steps; set diffusion.snr_shift instead")
    if c.density == "uniform":
        t_B = u_B
    else:
        normal_B = c.density_mean + c.density_std * _normal_quantile(u_B)
        # EDM table 1: ln sigma ~ N(mean, std^2). A factor on sigma = t / (1 - t) is shift_time on t.
        t_B = normal_B.exp() * shift if c.path == "edm" else normal_B.sigmoid()
    if c.path == "flow":
        return shift_time(t_B, shift)
    if c.path == "vp":
        return (t_B * c.num_train_steps).floor().clamp(max=c.num_train_steps - 1)
    return t_B


def _normal_quantile(u: Tensor) -> Tensor:
    """sqrt(2) erfinv(2u - 1), accurate in both tails; u = 0, which a generator can give, is moved inside."""
    limits = torch.finfo(u.dtype)
    normal: Tensor = torch.special.ndtri(u.clamp(limits.tiny, 1 - limits.eps))
    return normal


def shift_for(
    c: Diffusion,
    tokens_per_frame: int,
    num_latent_frames: int,
    height_px: int,
    width_px: int,
    num_frames: int,
) -> float:
    """The factor s of `shift_time` for clips of one size; larger and longer clips need more noise.

    tokens_per_frame: transformer tokens of one latent frame; num_frames: pixel frames. shift_value is s
    itself for `constant` and multiplies the rule otherwise (Open-Sora calls it scale).
    """
    if c.shift == "none":
        return 1.0
    if c.shift == "constant":
        return c.shift_value
    if c.shift == "sqrt_pixels_frames":
        frames = _open_sora_frames(num_frames, num_latent_frames)
        return c.shift_value * math.sqrt(height_px * width_px / 512**2) * math.sqrt(frames)
    assert c.shift == "linear_tokens", c.shift
    # Open-Sora 2.0 (2503.09642): the line through (256 tokens, 1) and (4096, 3), not clamped outside.
    per_frame = 1 + (tokens_per_frame - 256) * (3 - 1) / (4096 - 256)
    return c.shift_value * per_frame * math.sqrt(num_latent_frames)


def _open_sora_frames(num_frames: int, num_latent_frames: int) -> int:
    """Open-Sora 1.2's latent frames: 5 for every whole 17 frames, 1 for an image.

    The published rule gives 0 below 17 frames, which would send every time to 0; a shorter clip counts its
    own latent frames.
    """
    if num_frames == 1:
        return 1
    return num_frames // 17 * 5 or num_latent_frames
