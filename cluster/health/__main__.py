"""`python -m cluster.health`: one report for this node on standard output. Exit code 0 fit, 1 not, 2 usage.

python -m cluster.health --gpus 8 --hardware h100_sxm        everything, as one job step with one task a node
python -m cluster.health --check disk --folder /scratch      one check, by hand
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from cluster.health import compute, disk, limits, names, nodes, smi
from cluster.health.asked import Asked, find_place, read_bands
from cluster.health.guard import Check, run_check


class Known(NamedTuple):
    """A check, and the options that it reads besides --limit-s."""

    run: Check
    options: tuple[str, ...] = ()
    needs_gpus: bool = False


# In their order: what is cheap first; clocks while devices are warm; nodes last, since an unfit one takes no part.
CHECKS = {
    "limits": Known(limits.limits, ("shm_gib", "gpus")),
    "names": Known(names.names),
    "disk": Known(disk.disk, ("folder", "free_gib", "disk_mib_s")),
    "gpus": Known(smi.gpus, ("gpus",)),
    "ecc": Known(smi.ecc, ("gpus",), True),
    "rows": Known(smi.rows, ("gpus",), True),
    "compute": Known(compute.compute, ("gpus", "hardware")),
    "clocks": Known(smi.clocks, ("gpus",), True),
    "nodes": Known(nodes.nodes, ("gpus", "hardware", "skew_s", "arrival_s")),
}


def parser() -> argparse.ArgumentParser:
    default = Asked()
    top = argparse.ArgumentParser(prog="python -m cluster.health", description="Is this node fit to train?")
    top.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    top.add_argument("--check", nargs="+", choices=list(CHECKS), metavar="NAME", help=f"of {' '.join(CHECKS)}; all")
    top.add_argument("--gpus", type=int, help="how many this node must have; 0")
    top.add_argument("--hardware", help="profile in cluster/hardware, or a .toml, whose [health] gives bands of rates")
    top.add_argument("--folder", type=Path, action="append", help="to write and read in, may be repeated; TMPDIR")
    for name, what in (
        ("free_gib", "least free space of a folder"), ("disk_mib_s", "least rate of writing and of reading"),
        ("shm_gib", "least size of /dev/shm"), ("skew_s", "how far a clock may be off the others'"),
        ("arrival_s", "how long nodes wait for each other"), ("limit_s", "how long a check may take"),
    ):  # fmt: skip
        top.add_argument(f"--{name.replace('_', '-')}", type=float, help=f"{what}; {getattr(default, name):g}")
    return top


def read(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Known], Asked]:
    """The options; ValueError for one that no selected check reads, or that cannot be."""
    arguments = parser().parse_args(argv)
    gpus = arguments.gpus or 0
    chosen = {name: CHECKS[name] for name in CHECKS if name in (arguments.check or CHECKS)}
    given = {
        name: value for name, value in vars(arguments).items() if name not in ("json", "check") and value is not None
    }
    for name, value in given.items():
        if name != "limit_s" and not any(name in check.options for check in chosen.values()):
            raise ValueError(f"--{name.replace('_', '-')} has no effect on {' '.join(chosen)}; leave it out")
        if isinstance(value, int | float) and (value < 0 or (value == 0 and name.endswith("_s"))):
            raise ValueError(f"--{name.replace('_', '-')}={value:g} is too small; give a number above")
    without = [name for name in arguments.check or () if CHECKS[name].needs_gpus and not gpus]
    if without:
        raise ValueError(f"--check {' '.join(without)} looks at GPUs, and --gpus is 0; give their number")
    given["folders"] = tuple(given.pop("folder", ()))
    given["bands"] = read_bands(given.pop("hardware")) if "hardware" in given else {}
    chosen = {name: check for name, check in chosen.items() if gpus or not check.needs_gpus}
    return arguments, chosen, Asked(place=find_place(os.environ), **given)


def examine(chosen: dict[str, Known], asked: Asked) -> dict[str, Any]:
    """The report of this node."""
    checks: dict[str, Any] = {}
    for name, check in chosen.items():
        is_fit = all(done["verdict"] == "pass" for done in checks.values())
        limit_s = nodes.limit_s(asked) if name == "nodes" else asked.limit_s
        checks[name] = run_check(check.run, replace(asked, is_fit=is_fit), limit_s)
    bad = [name for name, done in checks.items() if done["verdict"] == "fail"]
    place = asked.place
    told = {"node": place.name, "number": place.number, "nodes": place.nodes}
    return {**told, "verdict": "fail" if bad else "pass", "checks": checks}


def lines(report: dict[str, Any]) -> str:
    """The report for people."""
    text = [f"{report['node']} (node {report['number']} of {report['nodes']}): {report['verdict']}"]
    for name, done in report["checks"].items():
        text.append(f"  {done['verdict']} {name} ({done['seconds']:.2f} s)")
        for found in done["findings"]:
            value = f"{found['value']:.4g}" if isinstance(found["value"], float) else found["value"]
            text.append(f"    {found['verdict']} {found['what']} {value}, {found['limit']}")
    return "\n".join(text)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    try:
        arguments, chosen, asked = read(argv)
    except ValueError as error:
        print(f"health: {error}", file=sys.stderr)
        return 2
    report = examine(chosen, asked)
    print(json.dumps(report) if arguments.json else lines(report), flush=True)
    bad = {name: done["because"] for name, done in report["checks"].items() if done["verdict"] == "fail"}
    for name, because in bad.items():
        print(f"health: {report['node']}: {name} failed: {because}", file=sys.stderr, flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    code = main()
    os._exit(code)  # a child that could not be killed must not be waited for
