"""Optimisation, precision and the rhythm of a run."""

from typing import Annotated, Literal

from pydantic import Field

from vidit.config.section import Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class Train(Section):
    """Optimisation, precision and the rhythm of a run."""

    task: Literal["dit", "vae"] = "dit"
    steps: int = Field(1000, gt=0)
    global_batch: int = Field(32, gt=0, description="clips (rows) in one optimizer step, over all ranks")
    micro_batch: int = Field(32, gt=0, description="rows in one forward and backward pass of one rank")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon for the matrices of the layers, AdamW for the rest, one learning rate"
    )
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    learning_rate: float = Field(1e-4, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    final_learning_rate: float = Field(0.0, ge=0, description="the cosine's end, as a fraction of the peak")
    clip_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    precision: Literal["auto", "fp32", "bf16", "fp64"] = Field(
        "auto",
        description="compute dtype; master weights are fp32. auto = bf16 where the device has it, else fp32; fp64 is "
        "for proofs, weights included",
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none", description="what the backward pass runs again: nothing, all but matrix products and attention, all"
    )
    compile: bool = Field(False, description="compile each block with inductor")
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: int = Field(10, gt=0)
    checkpoint_every: int = Field(500, gt=0)
    keep_checkpoints: int = Field(2, gt=0)
    keep_every: int = Field(0, ge=0, description="also keep every checkpoint whose step is a multiple; 0 = none")
    async_checkpoint: bool = Field(True, description="write checkpoints beside the training")
    validate_every: int = Field(500, gt=0)
    num_time_bands: int = Field(5, gt=0, description="bands of the timestep density in validation")
    sample_every: int = Field(0, ge=0, description="sample videos every so many steps; 0 = only at the end")
