"""Forward process, target and timestep density."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from vidit.config.section import Section

ForwardProcess = Literal["flow", "vp", "edm"]
Target = Literal["flow", "eps", "x", "v", "edm"]
Density = Literal["uniform", "logit_normal", "log_normal"]
LEGAL_TARGETS: dict[ForwardProcess, tuple[Target, ...]] = {
    "flow": ("flow", "x", "v"),
    "vp": ("eps", "x", "v"),
    "edm": ("edm",),
}
LEGAL_DENSITIES: dict[ForwardProcess, tuple[Density, ...]] = {
    "flow": ("uniform", "logit_normal"),
    "vp": ("uniform", "logit_normal"),
    "edm": ("log_normal",),
}


GivenKind = Literal[
    "image_head", "image_tail", "image_head_tail", "image_random",
    "quarter_head", "quarter_tail", "quarter_head_tail", "quarter_random",
    "random", "interpolate",
]  # fmt: skip


class Given(Section):
    """A share of the training clips of which some latent frames are given."""

    kind: GivenKind = Field(
        description="image: one frame, quarter: up to a quarter of them, at the head, the tail, both, or anywhere; "
        "random: each with a chance of 0.1 to 0.9; interpolate: every second one"
    )
    share: float = Field(gt=0, le=1, description="of the clips")


class Diffusion(Section):
    """Forward process, target, timestep density, loss weight."""

    path: ForwardProcess = "flow"
    target: Target = "flow"
    vp_schedule: Literal["linear", "scaled_linear", "cosine"] = "linear"
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    num_train_steps: int = Field(1000, gt=1)
    zero_terminal_snr: bool = True
    snr_shift: float = Field(1.0, gt=0, description="SNR is divided by it (CogVideoX-2B: 3)")
    sigma_data: float = Field(1.0, gt=0)
    sigma_min: float = Field(0.002, gt=0)
    sigma_max: float = Field(80.0, gt=0)
    density: Density = "logit_normal"
    density_mean: float = 0.0
    density_std: float = Field(1.0, gt=0)
    stratified: bool = Field(True, description="one stratum of the density for each clip of the global batch")
    shift: Literal["none", "constant", "sqrt_pixels_frames", "linear_tokens"] = "none"
    shift_value: float = Field(1.0, gt=0)
    weighting: Literal["none", "min_snr"] = "none"
    min_snr_gamma: float = Field(5.0, gt=0)

    given: tuple[Given, ...] = Field(
        (),
        description="latent frames that are given to some clips in training, as frame_times or given_channels say",
    )

    def faults(self) -> Iterator[str]:
        yield from self.path_faults()
        yield from self.given_faults()
        yield from self.target_faults()
        yield from self.density_faults()

    def path_faults(self) -> Iterator[str]:
        if self.path == "vp" and self.shift != "none":
            yield f"diffusion.shift={self.shift} does not apply to path vp; use none and set diffusion.snr_shift"
        if self.path == "vp" and self.vp_schedule != "cosine" and self.beta_start >= self.beta_end:
            yield (
                f"diffusion.beta_start={self.beta_start:g} is not below diffusion.beta_end={self.beta_end:g}; "
                "betas grow with t, swap them"
            )
        if self.path == "edm" and self.sigma_min >= self.sigma_max:
            yield (
                f"diffusion.sigma_min={self.sigma_min:g} is not below diffusion.sigma_max={self.sigma_max:g}; "
                "lower sigma_min"
            )

    def given_faults(self) -> Iterator[str]:
        total = sum(given.share for given in self.given)
        if total > 1 + 1e-9:
            yield f"diffusion.given takes shares of {total:g} in all, of clips there is 1; lower some"
        kinds = [given.kind for given in self.given]
        for kind in sorted({kind for kind in kinds if kinds.count(kind) > 1}):
            yield f"diffusion.given names {kind} {kinds.count(kind)} times; give it once, with the sum of the shares"

    def target_faults(self) -> Iterator[str]:
        if self.target not in LEGAL_TARGETS[self.path]:
            legal = " ".join(LEGAL_TARGETS[self.path])
            yield f"diffusion.target={self.target} is not defined on path {self.path}; use one of {legal}"
        elif self.target == "eps" and self.zero_terminal_snr:
            yield (
                "diffusion.target=eps is undefined at zero terminal SNR, where x_hat = (x_t - s e) / a divides by "
                "a = 0; use target=v or x, or zero_terminal_snr=false"
            )
        if self.weighting == "min_snr" and self.path == "edm":
            yield "diffusion.weighting=min_snr and EDM's own lambda(sigma) exclude each other; use none"

    def density_faults(self) -> Iterator[str]:
        if self.density not in LEGAL_DENSITIES[self.path]:
            legal = " ".join(LEGAL_DENSITIES[self.path])
            yield f"diffusion.density={self.density} does not fit path {self.path}; use one of {legal}"
