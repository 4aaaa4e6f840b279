"""Hardware: what one device and one node can do, read from cluster/hardware/NAME.toml or from a file of the user's.

For what is decided before a device is touched: a plan of the layout, and the bands that cluster.health holds a node to.
The denominator of MFU is not taken from here: vidit.train.peak measures it.
"""

import tomllib
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from vidit.config import ConfigError, Section

PROFILES = Path(__file__).parents[1] / "cluster" / "hardware"
Dtype = Literal["fp64", "fp32", "tf32", "bf16", "fp16", "fp8"]
Rate = Literal["matmul_flops", "copy_bytes_s", "all_reduce_bytes_s"]


class Hardware(Section):
    """One device and its node. Rates are a second; links are in one direction, for each device."""

    description: str = ""
    kind: Literal["cuda", "cpu"]
    devices: int = Field(ge=1, description="of a node")
    memory_bytes: float = Field(gt=0, description="of a device")
    memory_bytes_s: float = Field(gt=0)
    nvlink_bytes_s: float | None = Field(None, gt=0, description="to other devices of the node; None = by the host")
    network_bytes_s: float | None = Field(None, gt=0, description="to other nodes; None = not known")
    flops: dict[Dtype, float] = Field(min_length=1, description="dense peak by the dtype of the factors")
    health: dict[Rate, tuple[float, float]] = Field({}, description="lowest and highest rate of a sound node")

    @field_validator("flops")
    @classmethod
    def _positive(cls, flops: dict[Dtype, float]) -> dict[Dtype, float]:
        for name, rate in flops.items():
            if rate <= 0:
                raise ValueError(f"{name} = {rate:g} is not above 0; leave out what the device does not have")
        return flops

    @model_validator(mode="after")
    def _bands(self) -> Self:
        for name, (low, high) in self.health.items():
            if not 0 <= low < high:
                raise ValueError(f"health.{name} = [{low:g}, {high:g}] is no band; give the lowest, then the highest")
        return self


def read_hardware(name: str) -> Hardware:
    """The profile of that name or file. ConfigError with every fault."""
    path = Path(name) if name.endswith(".toml") else PROFILES / f"{name}.toml"
    if not path.is_file():
        known = " ".join(sorted(file.stem for file in PROFILES.glob("*.toml")))
        raise ConfigError([f"no hardware {name!r}: {path} does not exist; use one of {known}, or a path to a .toml"])
    try:
        return Hardware.model_validate(tomllib.loads(path.read_text()))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"{path}: {error}"]) from error
    except ValidationError as error:
        found = [f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise ConfigError(found) from error
