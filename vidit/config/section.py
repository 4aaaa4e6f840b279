"""What every section is made of: the base class, the kinds of numbers, the error that lists faults."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
AttentionBackend = Annotated[
    Literal["sdpa", "flash"],
    BeforeValidator(lambda value: "sdpa" if value == "auto" else value),  # what runs were begun with before
    Field(description="torch's attention, or flash-attn's, which takes no mask; which one is no matter of the weights"),
]


class Section(BaseModel):
    """Base of every section: immutable, and a field that does not exist is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ConfigError(ValueError):
    """Every fault of a config, one a line."""

    def __init__(self, faults: Sequence[str]):
        super().__init__("\n".join(faults) if len(faults) == 1 else f"{len(faults)} faults:\n- " + "\n- ".join(faults))
        self.faults = tuple(faults)


def refuse(faults: Iterable[str]) -> None:
    """Raise ConfigError with all of them, where there are any."""
    found = list(faults)
    if found:
        raise ConfigError(found)
