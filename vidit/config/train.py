"""Optimisation, precision and the rhythm of a run."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from vidit.config.section import Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class Train(Section):
    """Optimisation, precision and the rhythm of a run."""

    task: Literal["dit", "unet", "vae"] = Field(
        "dit", description="what is trained: the transformer of model, the U-Net of unet, or the VAE"
    )
    steps: int = Field(1000, gt=0)
    global_batch: int = Field(
        32,
        gt=0,
        description="clips (rows) in one optimizer step, over all ranks; with data.packed_tokens packed rows, each of "
        "several clips",
    )
    micro_batch: int = Field(
        32,
        gt=0,
        description="rows in one forward and backward pass of one rank; 1 (packed row) with data.packed_tokens",
    )
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
    deterministic: bool = Field(
        False,
        description="kernels that sum in the same order every time, so that on CUDA too a resumed run is the "
        "uninterrupted one bit for bit; a step may take half as long again or more (on a CPU all do without it)",
    )
    init_from: str | None = Field(
        None, description="a folder of weights to begin with, written by `vidit export` or `vidit import`"
    )
    trainable: tuple[str, ...] = Field(
        (), description="patterns of the names of parameters that alone are trained, such as 'unet.*.temporal_*'"
    )
    frozen: tuple[str, ...] = Field((), description="the same of those that are not trained; give one of the two")
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: int = Field(10, gt=0)
    checkpoint_every: int = Field(500, gt=0)
    keep_checkpoints: int = Field(2, gt=0)
    keep_every: int = Field(0, ge=0, description="also keep every checkpoint whose step is a multiple; 0 = none")
    async_checkpoint: bool = Field(True, description="write checkpoints beside the training")
    validate_every: int = Field(500, gt=0)
    num_time_bands: int = Field(5, gt=0, description="bands of the timestep density in validation")
    on_nonfinite: Literal["stop", "skip", "roll_back"] = Field(
        "stop", description="where loss or gradient is not finite: skip the update, or go back and pass over the steps"
    )
    on_spike: Literal["ignore", "stop", "skip", "roll_back"] = Field(
        "ignore", description="the same where the loss is far above those before it"
    )
    spike_factor: float = Field(10.0, gt=0, description="how far: median + factor x median absolute deviation")
    spike_window: int = Field(128, gt=1, description="of how many losses before")
    roll_back_checkpoints: int = Field(1, gt=0, description="1 = go back to the newest checkpoint, 2 = the one before")
    max_recoveries: int = Field(3, gt=0, description="skips and roll-backs before the run stops, ...")
    recovery_window: int = Field(1000, gt=0, description="... in how many steps")
    sample_every: int = Field(0, ge=0, description="sample videos every so many steps; 0 = only at the end")

    @property
    def recovers(self) -> bool:
        """Whether the run goes on after any faulty step."""
        return bool({self.on_nonfinite, self.on_spike} & {"skip", "roll_back"})

    @property
    def rolls_back(self) -> bool:
        """Whether any faulty step sends the run back to a checkpoint."""
        return "roll_back" in (self.on_nonfinite, self.on_spike)

    def faults(self) -> Iterator[str]:
        """What is wrong with this section alone."""
        if self.trainable and self.frozen:
            yield "train.trainable and train.frozen say the same in two ways; give one of them"
        if self.rolls_back and self.roll_back_checkpoints > self.keep_checkpoints:
            yield (
                f"train.roll_back_checkpoints={self.roll_back_checkpoints} exceeds train.keep_checkpoints="
                f"{self.keep_checkpoints}: it would be deleted by then; keep at least as many"
            )
