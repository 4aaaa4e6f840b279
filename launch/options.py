"""The options of `vidit submit`. Nothing is imported for them but argparse: every `vidit` command parses."""

import argparse

from launch import BACKENDS


def takes_job_options(command: argparse.ArgumentParser) -> None:
    """Add the back-end and the options of a job, which `launch.commands.submit` reads."""
    add = command.add_argument
    add("backend", choices=BACKENDS, metavar="BACKEND", help=" ".join(BACKENDS))
    add("--site", default="", help="the cluster: a name in cluster/sites, or a path to a .toml")
    add("--nodes", type=_count, default=1)
    add("--min-nodes", type=_count, help="ray: with how many it may go on; default only with all")
    add("--devices", type=_count, help="on each node, one rank each; default all of the site, or 1")
    add("--time", help="limit, such as 90 (minutes), 4:00:00 or 2-12:00:00; default that of the site")
    add(
        "--ranks",
        choices=("device", "node"),
        help="what is started on a node: one process a device, or one that starts the ranks",
    )
    add("--name", help="of the job; default that of the config")
    add("--after", action="append", default=[], metavar="JOB", help="an id or a run directory, may be repeated: start "
        "when that has ended well")  # fmt: skip
    add("--array", metavar="FILE", help="one run for each line of overrides, in RUN/0, RUN/1 and so on")
    add("--chain", type=_count, default=1, metavar="N", help="N jobs in a row, for sites that requeue nothing")
    add("--restarts", type=int, help="failures without a new checkpoint in between after which to start again")
    add("--address", default="", help="ray: its job server; default that of the site or of RAY_API_SERVER_ADDRESS")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="more options, as --sbatch=--account=x")
    add("--dry-run", action="store_true", help="print the script and the command, and submit nothing")


def _count(text: str) -> int:
    if "," in text:
        raise argparse.ArgumentTypeError(f"{text}: every node must give equally many devices; give one number")
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


_count.__name__ = "whole number"  # as argparse names it for what is no number at all
