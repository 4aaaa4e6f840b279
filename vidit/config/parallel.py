"""The layout of the ranks, and where they are started."""

from typing import Literal

from pydantic import Field

from vidit.config.section import NotNegative, Positive, Section


class Parallel(Section):
    """The layout: how many ranks share the model, the tokens and the rows; the product of the axes is all ranks."""

    pipeline: Positive = 1
    replicate: Positive = Field(1, description="copies of the sharded state (HSDP)")
    shard: NotNegative = Field(0, description="ranks that divide rows and state; 0 = all that the other axes leave")
    sequence: Positive = Field(1, description="ranks that divide the video tokens of the same rows")
    tensor: Positive = 1
    sequence_kind: Literal["auto", "ulysses", "ring", "ulysses_ring", "window"] = "auto"
    ulysses: NotNegative = Field(0, description="ranks of the Ulysses part of ulysses_ring; 0 = as many as fit")
    sharded_norms: bool | Literal["auto"] = Field(
        "auto", description="tensor ranks divide the tokens between their regions (2205.05198); auto: where they can"
    )
    zero: Literal[0, 1, 2, 3] = Field(
        3, description="what shard divides: optimizer state, gradients too, parameters too; 0 = nothing (DDP)"
    )
    cpu_offload: bool = Field(False, description="parameters and optimizer state stay in host memory")
    reduce_dtype: Literal["fp32", "bf16"] = Field("fp32", description="in which gradients are summed over ranks")
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = "1f1b"
    stages_per_rank: Positive = Field(
        1, description="stages of each pipeline rank, for interleaved; zero_bubble: 1 or 2"
    )
    vae_context: Literal["none", "time", "rows"] = Field(
        "none", description="what the sequence ranks divide in the VAE: its frames, or its pictures from top to bottom"
    )
    count_communication: bool = Field(
        False, description="count calls and bytes of every collective of the second step, on every rank"
    )
    timeout_s: float = Field(600.0, ge=1, le=1e6, description="how long ranks wait for one another before all stop")
    hang_factor: float = Field(
        20.0, ge=0, description="a section that takes so many times the median step hangs, and the run ends; 0 = never"
    )
    hang_floor_s: float = Field(120.0, gt=0, description="but no section shorter than this hangs")
    slow_rank: float = Field(
        0.25, gt=0, description="a rank is named that takes longer for its own work than the others, by this share"
    )

    @property
    def ranks_per_row(self) -> int:
        """Ranks that work on the same rows of a batch."""
        return self.pipeline * self.sequence * self.tensor


class Launch(Section):
    """Where the ranks of a run are started."""

    local: Positive = Field(1, description="ranks on this machine; 1 = this process")
    max_restarts: NotNegative = Field(
        0, description="how often in a row the ranks are started again after one failed, without a new checkpoint"
    )
