"""A site: what a cluster is like, read from cluster/sites/NAME.toml or from a file of the user's.

Everything that differs between clusters and not between runs stands here: partition and account, devices of a node,
network interfaces, modules, the container. A key that does not exist is an error that names the file.
"""

import re
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from launch.hardware import read_hardware
from vidit.config import ConfigError, Section

SITES = Path(__file__).parents[1] / "cluster" / "sites"
VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"
OWN = ("SLURM_", "SBATCH_", "VIDIT_")


class Slurm(Section):
    """What SLURM is asked for besides nodes and time; None = the option is left out."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclusive: bool = False
    devices_as: Literal["gres", "gpus-per-node", "none"] = Field(
        "gres", description="how devices are asked for: --gres=gpu:N, --gpus-per-node=N, or not at all"
    )
    device_type: str = Field("", description="such as h100, as in --gres=gpu:h100:8")
    cpus_per_device: int | None = Field(None, ge=1)
    memory: str | None = Field(None, description="of a node, as --mem takes it")
    bind: str | None = Field(None, description="as --cpu-bind of srun takes it")
    signal: Literal["USR1", "USR2"] = Field("USR1", description="what asks the script to save; ranks get USR1 of it")
    signal_before_s: int = Field(300, ge=10, le=65535, description="how long before the time limit")
    requeue: bool = Field(True, description="whether a job may put itself back into the queue")
    options: tuple[str, ...] = Field((), description="more options of sbatch, such as --comment=x")


class Ray(Section):
    """How a Ray cluster is reached and what is asked of it."""

    address: str | None = Field(
        None, description="of its job server, such as http://head:8265; None = RAY_API_SERVER_ADDRESS or RAY_ADDRESS"
    )
    device: str = Field("GPU", min_length=1, description="what Ray calls a device: GPU, CPU, or a resource of its own")
    cpus_per_device: int = Field(1, ge=1)
    wait_s: int = Field(600, ge=1, description="how long nodes are waited for before the job fails")
    settle_s: int = Field(30, ge=1, description="how long all nodes are waited for where fewer will do")
    grace_s: int = Field(120, ge=1, description="what ranks that are asked to stop have to save")


class Container(Section):
    """In what the processes run; pyxis is a plug-in of srun, Apptainer a command before ours."""

    runtime: Literal["pyxis", "apptainer"]
    image: str
    mounts: tuple[str, ...] = Field(
        (), description="host[:inside[:options]], besides workdir, code and run directories"
    )


class Health(Section):
    """What is run once on every node before the ranks; a node where it fails is left out from then on.

    Words of the command that stand for something of the job: {python} its interpreter, {devices} its devices of a node,
    {hardware} the site's.
    """

    command: tuple[str, ...] = Field(min_length=1)
    timeout_s: int = Field(300, ge=1)


class Site(Section):
    """One cluster."""

    description: str = ""
    hardware: str | None = Field(None, description="profile in cluster/hardware, or a path to a .toml")
    devices: int | None = Field(None, ge=1, description="of a node; a job may ask for fewer, not for more")
    minutes: int | None = Field(None, ge=1, description="time limit of a job that gives none")
    slurm: Slurm = Slurm()
    ray: Ray = Ray()
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = Field((), description="lines of bash before anything is started")
    environment: dict[str, str] = Field({}, description="variables that are set for every process")
    keep: tuple[str, ...] = Field(
        ("HOME", "USER", "LANG", "PATH", "TERM"), description="variables of who submits that go along; no others do"
    )
    container: Container | None = None
    health: Health | None = None

    @field_validator("environment")
    @classmethod
    def _names(cls, environment: dict[str, str]) -> dict[str, str]:
        _check_names(environment)
        return environment

    @field_validator("keep")
    @classmethod
    def _kept(cls, keep: tuple[str, ...]) -> tuple[str, ...]:
        _check_names(keep)
        return keep

    @model_validator(mode="after")
    def _set_once(self) -> "Site":
        both = sorted(set(self.environment) & set(self.keep))
        if both:
            raise ValueError(f"{' '.join(both)} would be kept and set; leave out one of keep and environment")
        return self

    @model_validator(mode="after")
    def _hardware(self) -> "Site":
        if self.hardware:
            there = read_hardware(self.hardware).devices
            if self.devices and self.devices > there:
                raise ValueError(
                    f"devices={self.devices}, and a node of hardware {self.hardware} has {there}; use that"
                )
        elif self.health and "{hardware}" in self.health.command:
            raise ValueError("health.command has {hardware}, and the site names none; set hardware, or leave it out")
        return self


def _check_names(names: "dict[str, str] | tuple[str, ...]") -> None:
    for name in names:
        if not re.match(VARIABLE, name) or name.startswith(OWN):
            raise ValueError(f"{name!r} is not a name for a variable of the environment, or not yours to set")


def read_site(name: str) -> Site:
    """The site of that name or file; one without any settings for the empty name. ConfigError with every fault."""
    if not name:
        return Site()
    path = Path(name) if name.endswith(".toml") else SITES / f"{name}.toml"
    if not path.is_file():
        if "/" in name and not name.endswith(".toml"):
            raise ConfigError([f"--site={name} is a path that does not end in .toml; give the file itself"])
        known = " ".join(sorted(file.stem for file in SITES.glob("*.toml")))
        raise ConfigError([f"no site {name!r}: {path} does not exist; use one of {known}, or a path to a .toml"])
    try:
        return Site.model_validate(tomllib.loads(path.read_text()))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"{path}: {error}"]) from error
    except ValidationError as error:
        found = [f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise ConfigError(found) from error
