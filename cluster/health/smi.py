"""nvidia-smi: what it says of each GPU, asked by field and read as CSV.

Fields and their words are those of nvidia-smi(1), `--help-query-gpu` and `--help-query-remapped-rows`: counts, `Active`
and `Not Active`, `Yes` and `No`, `[N/A]` for what a device does not have, `[GPU is lost]` for one that is gone.
"""

import csv
import shutil
import subprocess
from collections.abc import Iterator, Sequence

from cluster.health.asked import Asked
from cluster.health.finding import Finding, UnfitError, at_least, at_most, equal

ABSENT = ("N/A", "Not Supported", "Not Available")
WORDS = {"no": 0, "not active": 0, "disabled": 0, "yes": 1, "active": 1, "enabled": 1}
COUNTERS = ("ecc.errors.uncorrected.volatile.total",)
ROWS = ("remapped_rows.uncorrectable", "remapped_rows.pending", "remapped_rows.failure")
SLOWDOWNS = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
REASONS = ("clocks_event_reasons", "clocks_throttle_reasons")  # the name until driver 535
SMI_S = 20.0


def read_table(text: str, fields: Sequence[str]) -> list[dict[str, str]]:
    """Rows of `--format=csv,noheader,nounits`. UnfitError where one has not as many cells as fields."""
    rows = [[cell.strip().strip("[]") for cell in row] for row in csv.reader(text.splitlines()) if row]
    for row in rows:
        if len(row) != len(fields):
            raise UnfitError(
                f"nvidia-smi says {', '.join(row)!r}, {len(row)} cells for {len(fields)} fields; "
                "a GPU may have fallen off the bus: look at dmesg for Xid, and reset or drain the node"
            )
    return [dict(zip(fields, row, strict=True)) for row in rows]


def as_count(what: str, cell: str) -> int | None:
    """A counter or a yes; None for what the device lacks. UnfitError for anything else, such as `GPU is lost`."""
    if cell in ABSENT:
        return None
    if cell.lower() in WORDS:
        return WORDS[cell.lower()]
    if not cell.isdecimal():
        raise UnfitError(f"{what} is {cell!r}, must be a number; look at dmesg for Xid, and reset or drain the node")
    return int(cell)


def query(kind: str, fields: Sequence[str]) -> list[dict[str, str]]:
    """One row a device. UnfitError where nvidia-smi is absent, fails or hangs."""
    if shutil.which("nvidia-smi") is None:
        raise UnfitError("no nvidia-smi on PATH, and GPUs are expected; install the driver, or ask with --gpus 0")
    argv = ["nvidia-smi", f"--query-{kind}={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=SMI_S)
    except subprocess.TimeoutExpired as error:
        raise UnfitError(f"nvidia-smi has not answered in {SMI_S:g} s; the driver hangs: reboot the node") from error
    if done.returncode:
        said = (done.stdout.strip() or done.stderr.strip()).splitlines()
        raise UnfitError(
            f"nvidia-smi ends with code {done.returncode}: {said[0] if said else 'no word'}; check the driver"
        )
    return read_table(done.stdout, fields)


def gpus(asked: Asked) -> Iterator[Finding]:
    """How many the driver shows. More are allowed: a job may be given some of a node's."""
    if not asked.gpus and shutil.which("nvidia-smi") is None:
        yield equal("nvidia-smi", "absent", "absent", "")
        return
    found = query("gpu", ("index", "uuid", "name"))
    cure = "look at dmesg for Xid 79 (off the bus); reboot or drain the node"
    yield at_least("GPUs of the driver", len(found), asked.gpus, cure)
    kinds = sorted({row["name"] for row in found})
    yield equal("kinds of GPU", ", ".join(kinds), kinds[0] if kinds else "", "give a job nodes with one kind of GPU")
    for row in found:
        if not row["uuid"].startswith("GPU-"):
            raise UnfitError(
                f"gpu {row['index']} says {row['uuid']!r}, must be its UUID; look at dmesg for Xid, and drain"
            )


def ecc(asked: Asked) -> Iterator[Finding]:
    """Errors that memory could not correct since the driver was loaded."""
    for row in query("gpu", ("index", "ecc.mode.current", *COUNTERS)):
        mode = as_count(f"gpu {row['index']} ecc.mode.current", row["ecc.mode.current"])
        if mode is not None:
            yield equal(f"gpu {row['index']} ECC", mode, 1, "turn it on with nvidia-smi -e 1 and reboot")
        for name in COUNTERS:
            count = as_count(f"gpu {row['index']} {name}", row[name])
            if count is not None:
                yield at_most(f"gpu {row['index']} {name}", count, 0, "reset the GPU; drain the node if they come back")


def rows(asked: Asked) -> Iterator[Finding]:
    """Rows of memory that were replaced; one that failed to be, or waits for a reset, makes a GPU unfit."""
    limits = dict(zip(ROWS, (8, 0, 0), strict=True))  # a bank has 8 spare rows
    cures = dict(zip(ROWS, ("have the GPU replaced", "reset the GPU", "have the GPU replaced"), strict=True))
    for row in query("remapped-rows", ("gpu_bus_id", *ROWS)):
        for name in ROWS:
            count = as_count(f"gpu {row['gpu_bus_id']} {name}", row[name])
            if count is not None:
                yield at_most(f"gpu {row['gpu_bus_id']} {name}", count, limits[name], cures[name])


def clocks(asked: Asked) -> Iterator[Finding]:
    """Slowdowns by heat or by the power supply; idle clocks and the power cap are no fault."""
    for row in _clocks():
        for name in SLOWDOWNS:
            state = as_count(f"gpu {row['index']} {name}", row[name])
            if state is not None:
                yield equal(f"gpu {row['index']} {name}", state, 0, "check cooling and power; drain the node")
        clock = as_count(f"gpu {row['index']} clock", row["clocks.current.sm"])
        if clock is not None:
            yield Finding(f"gpu {row['index']} SM clock", clock, f"of {row['clocks.max.sm']} MHz at most", "")


def _clocks() -> list[dict[str, str]]:
    plain = ("index", "clocks.current.sm", "clocks.max.sm")
    for prefix in REASONS:
        fields = (*plain, *(f"{prefix}.{name}" for name in SLOWDOWNS))
        try:
            found = query("gpu", fields)
        except UnfitError as error:
            if prefix == REASONS[-1] or "not a valid field" not in str(error):
                raise
            continue
        return [{key.removeprefix(f"{prefix}."): cell for key, cell in row.items()} for row in found]
    raise AssertionError(REASONS)
