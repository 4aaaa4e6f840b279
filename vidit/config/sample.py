"""How videos are drawn from a trained model."""

from typing import Literal

from pydantic import Field

from vidit.config.section import Section

Sampler = Literal["ddim", "dpmpp_2m", "heun", "euler"]


class Sample(Section):
    """How videos are drawn from a trained model."""

    sampler: Sampler = "euler"
    num_steps: int = Field(50, gt=0)
    guidance: float = Field(7.5, ge=0, description="classifier-free guidance scale s: u + s (c - u)")
    motion_guidance: float = Field(
        1.0, ge=0, description="scale of what attention through time changes (GenTron: 1.0 to 1.3); 1 is none"
    )
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    reconstruction_guidance: float = Field(
        0.0,
        ge=0,
        description="how strongly frames that a video begins with pull those behind them, in a model that was not "
        "trained to be given any (Video Diffusion Models: 9 and 50)",
    )
    micro_batch: int = Field(8, gt=0)
    prompts: tuple[str, ...] = Field((), description="captions sampled during training")
