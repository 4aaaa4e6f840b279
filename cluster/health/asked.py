"""What is asked of a node: the options of the command, and its place among the nodes of the job."""

import os
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HARDWARE = Path(__file__).parents[1] / "hardware"
Band = tuple[float, float]


@dataclass(frozen=True)
class Place:
    """Which node of how many this is, and where they meet: one process a node."""

    number: int = 0
    nodes: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    name: str = field(default_factory=socket.gethostname)


def find_place(environment: Mapping[str, str]) -> Place:
    """From RANK and WORLD_SIZE, else from SLURM's variables of a step; MASTER_ADDR and MASTER_PORT with several nodes.

    ValueError where a part is missing.
    """
    name = environment.get("SLURMD_NODENAME") or socket.gethostname()
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in environment and world in environment:
            number, nodes = int(environment[rank]), int(environment[world])
            break
    else:
        return Place(name=name)
    if not 0 <= number < nodes:
        raise ValueError(f"{rank}={number} is not below {world}={nodes}; start one process on each node")
    if nodes == 1:
        return Place(name=name)
    absent = [key for key in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(key)]
    if absent:
        raise ValueError(f"{' '.join(absent)} not set, and {world}={nodes}; set them to where node 0 can be reached")
    return Place(number, nodes, environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), name)


@dataclass(frozen=True)
class Asked:
    """What the checks go by. Sizes in bytes, times in seconds, rates a second."""

    place: Place = field(default_factory=lambda: find_place(os.environ))
    gpus: int = 0
    bands: Mapping[str, Band] = field(default_factory=dict)
    folders: tuple[Path, ...] = ()
    free_gib: float = 10.0
    disk_mib_s: float = 20.0
    shm_gib: float = 1.0
    skew_s: float = 1.0
    limit_s: float = 30.0
    arrival_s: float = 120.0
    is_fit: bool = True  # so far; a node that is not takes no part in what nodes do together

    def band(self, rate: str) -> Band | None:
        return self.bands.get(rate)


def read_bands(name: str, folder: Path = HARDWARE) -> dict[str, Band]:
    """The [health] section of a hardware profile, by its name or as a path. ValueError where it is not one."""
    path = Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    if not path.is_file():
        known = " ".join(sorted(file.stem for file in folder.glob("*.toml")))
        raise ValueError(f"no hardware {name!r}: {path} does not exist; use one of {known}, or a path to a .toml")
    try:
        found: dict[str, Any] = tomllib.loads(path.read_text()).get("health", {})
        return {rate: (float(low), float(high)) for rate, (low, high) in found.items()}
    except (tomllib.TOMLDecodeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; [health] holds rate = [lowest, highest]") from error
