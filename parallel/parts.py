"""Which part each rank has when the latent frames of a video, or its latent rows, are divided. Arithmetic, no torch.

Time: 1 + n latent frames of a causal VAE are 1 + n s frames: s for each but the first, which has 1. Counted as if
that had s too, `missing` s - 1 in front, every rank has the same number: ceil((1 + n) / ranks) latent frames. What
the last ranks lack is padded behind, where nothing that is real looks.
Rows: no row is special, and both neighbours are looked at, so padding would be seen: the ranks must divide them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from parallel.layout import divisors, words

Over = Literal["time", "rows"]


@dataclass(frozen=True)
class Parts:
    """A dim of `length` entries, `stride` for each latent one, divided over `ranks`."""

    over: Over
    length: int
    stride: int
    ranks: int

    @property
    def missing(self) -> int:
        """Entries that the first rank's part is short of."""
        return self.stride - 1 if self.over == "time" else 0

    @property
    def latent(self) -> int:
        """Latent frames or rows in all."""
        return (self.length + self.missing) // self.stride

    @property
    def own(self) -> int:
        """Entries of each rank, with those missing and those padded."""
        return -(-self.latent // self.ranks) * self.stride

    @property
    def padding(self) -> int:
        """Entries behind the last real one."""
        return self.own * self.ranks - self.missing - self.length

    def scaled(self, stride: int) -> "Parts":
        """The same latent frames or rows at another stride."""
        first = stride - 1 if self.over == "time" else 0
        return Parts(self.over, self.latent * stride - first, stride, self.ranks)

    def faults(self) -> Iterator[str]:
        """What keeps the ranks from dividing it."""
        return (context_faults if self.over == "time" else row_faults)(self.latent, self.ranks)


def context_faults(latent_frames: int, ranks: int) -> Iterator[str]:
    """What keeps `ranks` from dividing a video of `latent_frames` over time.

    A convolution of 3 frames looks 2 back, and they come from one rank. (One latent frame, an image, is never
    divided: every rank has it whole.)
    """
    if ranks > 1 and ranks >= latent_frames:
        legal = f"1 to {latent_frames - 1}" if latent_frames > 2 else "1"
        yield (
            f"{latent_frames} latent frames over {ranks} ranks are {-(-latent_frames // ranks)} on each rank, but the "
            "next rank's convolutions look 2 back, so there must be fewer ranks than latent frames; "
            f"use {legal}"
        )


def row_faults(latent_rows: int, ranks: int) -> Iterator[str]:
    """What keeps `ranks` from dividing a picture of `latent_rows` from top to bottom."""
    if latent_rows % ranks:
        yield f"{latent_rows} latent rows are not divisible by {ranks} ranks; use one of {words(divisors(latent_rows))}"
