"""What srun tells a process of a step, in the words of torchrun; no torchrun is needed for it.

Only variables of the step count, and only steps of several tasks: those of the job (SLURM_PROCID=0, SLURM_NTASKS) also
stand in a batch script and in a shell on a node, which are no ranks.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

PER_NODE = re.compile(r"(\d+)(?:\(x(\d+)\))?")
ENOUGH = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Node:
    """Which of how many nodes this is, and where they meet."""

    number: int = 0
    count: int = 1
    address: str = "127.0.0.1"
    port: int = 0


ALONE = Node()


def _is_step(environment: Mapping[str, str]) -> bool:
    return "SLURM_STEP_ID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK and so on for one of several tasks of a step; nothing for any other process.

    ValueError where nodes have different numbers of tasks, or nobody says where the ranks are to meet.
    """
    if not _is_step(environment):
        return {}
    _require_meeting_point(environment)
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])),
    }


def own_node() -> Node:
    """The node of this process."""
    return node_of(os.environ)


def node_of(environment: Mapping[str, str]) -> Node:
    """The node of a process that srun started once on each of several nodes, to start the ranks there.

    ValueError where there is more than one such process on a node.
    """
    if not _is_step(environment):
        return ALONE
    count = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    if count != 1:
        raise ValueError(
            f"launch.local starts ranks, but srun has started {count} processes on each node; leave launch.local out, "
            "or start one process a node (srun --ntasks-per-node=1)"
        )
    _require_meeting_point(environment)
    number, nodes = int(environment["SLURM_NODEID"]), int(environment["SLURM_STEP_NUM_NODES"])
    return Node(number, nodes, environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))


def tasks_per_node(text: str) -> int:
    """Of `8(x2)`, as SLURM writes it: 8. ValueError where nodes differ, since axes of a layout divide a node evenly."""
    counts = {int(count) for count, _ in PER_NODE.findall(text)}
    if len(counts) != 1:
        raise ValueError(
            f"srun has started {text} tasks on the nodes; ranks must be equally many on each: give --ntasks-per-node, "
            "and devices that every node has"
        )
    return counts.pop()


def _require_meeting_point(environment: Mapping[str, str]) -> None:
    absent = [name for name in ENOUGH if not environment.get(name)]
    if absent:
        raise ValueError(
            f"srun has started {environment['SLURM_STEP_NUM_TASKS']} tasks, but {' and '.join(absent)} is not set, so "
            'they cannot meet; in the batch script: export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" '
            "| head -n1) MASTER_PORT=29500"
        )
