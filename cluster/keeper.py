"""The commands of a throwaway cluster: `up` starts a keeper that lives on, `down` ends it, `keep` is the keeper."""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.processes import GONE_S, end, is_alive


def command(
    name: str,
    shape: type[Any],
    up: Callable[[Path, Any], str],
    down: Callable[[Path], None],
    keep: Callable[[Path, Any, bool], None],
    argv: Sequence[str] | None,
) -> int:
    """`python -m cluster.NAME.local`; `shape` is a dataclass whose fields are options of `up`. 1 after an error."""
    top = argparse.ArgumentParser(prog=f"python -m cluster.{name}.local", description=f"A throwaway {name}.")
    commands = top.add_subparsers(dest="command", required=True)
    for verb in ("up", "down", "keep"):
        one = commands.add_parser(verb)
        one.add_argument("root", type=Path)
        if verb == "up":
            for field, default in asdict(shape()).items():
                one.add_argument(f"--{field.replace('_', '-')}", type=int, default=default)
        if verb == "keep":
            one.add_argument("--shape", type=json.loads, required=True)
            one.add_argument("--owned", action="store_true")
    given = vars(top.parse_args(argv))
    verb, root = given.pop("command"), given.pop("root")
    try:
        if verb == "up":
            print(up(root, shape(**given)))
        elif verb == "down":
            down(root)
        else:
            keep(root, shape(**given["shape"]), given["owned"])
    except (ValueError, RuntimeError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0


def empty(root: Path) -> Path:
    """The directory of a new cluster, made. ValueError where it holds anything."""
    root = root.resolve()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(root.iterdir()):
        raise ValueError(f"{root} is not empty; give a new directory, or end what runs there with `down`")
    return root


def ended(root: Path, keeper: int | None, find: Callable[[], list[int]]) -> None:
    """End a keeper and what it, or one that was killed, has left in `root`; delete the directory."""
    deadline = time.monotonic() + GONE_S
    if keeper and is_alive(keeper):
        os.kill(keeper, signal.SIGTERM)
        while is_alive(keeper) and time.monotonic() < deadline:
            time.sleep(0.02)
    end(find)
    shutil.rmtree(root)
