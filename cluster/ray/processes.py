"""Processes of a throwaway Ray: found by a mark in their environment, or by the directory that they run in.

Some of Ray's agents outlive the daemon that started them, and so does what a job started. Both marks are inherited; a
process may change its directory, and Ray's workers and agents overwrite their environment with their title.
"""

import os
from pathlib import Path
from typing import NamedTuple

from cluster.processes import environment_of, is_alive

ROOT, NODE = "RAY_LOCAL_ROOT", "RAY_LOCAL_NODE"
NET = "127.0.0."


class Mark(NamedTuple):
    """The directory of a Ray and the node to which a process belongs."""

    root: Path
    node: str


def folder_of(root: Path, node: str) -> Path:
    """Where the daemons of a node run, and what they write."""
    return root / node.removeprefix(NET)


def mark_of(process: int) -> Mark | None:
    """None where it belongs to no throwaway Ray."""
    told = environment_of(process)
    if told.get(ROOT):
        return Mark(Path(told[ROOT]), told.get(NODE, ""))
    try:
        folder = Path(f"/proc/{process}/cwd").readlink()
    except OSError:
        return None
    is_node = folder.name.isdecimal() and (folder.parent / "keeper").is_file()
    return Mark(folder.parent, NET + folder.name) if is_node else None


def marked() -> list[tuple[int, Mark]]:
    """Every living process of any throwaway Ray but this one, which may be its keeper."""
    every = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return [(one, mark) for one in every if one != os.getpid() and (mark := mark_of(one)) and is_alive(one)]


def find(root: Path, node: str | None = None) -> list[int]:
    """Those of the Ray in `root`; of one node only where it is named."""
    return [process for process, mark in marked() if mark.root == root and node in (None, mark.node)]


def orphans() -> list[int]:
    """Those whose keeper was killed: nobody else ends them."""
    return [process for process, mark in marked() if not _has_keeper(mark.root)]


def _has_keeper(root: Path) -> bool:
    try:
        return is_alive(int((root / "keeper").read_text()))
    except (OSError, ValueError):
        return False
