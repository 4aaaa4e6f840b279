"""All ranks of one start on Ray: an actor on each of several nodes, kept apart by a placement group.

A gang is made, watched to its end and closed as a whole: ranks whose peer is gone cannot go on, so nothing of a gang is
repaired. Ray is imported when a gang is made.
"""

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.ending import Ended, lost, stayed
from launch.node_ranks import KILLED_S, NodeRanks
from launch.ray_order import Order

POLL_S = 0.3
START_S = 120.0  # for Ray to start its workers
REPORT_S = 10.0  # what the others of a node get to say why: 3 s to ask who is silent, 5 s for rank 0 to keep the store
LEAVE_S = 30.0  # what ranks get to notice that a peer is gone, to save and to leave
CALLS = 4  # at once: wait, ask and end


class LostError(RuntimeError):
    """An actor or its node is gone before its ranks were started."""


def node_resources() -> list[dict[str, float]]:
    """What each living node has in all."""
    return [dict(node["Resources"]) for node in _nodes() if node["Alive"]]


class Gang:
    """The actors of `count` nodes. Make it with `form`."""

    def __init__(self, order: Order, group: Any, count: int):
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.order, self.group, self.count = order, group, count
        devices, bundle = order.devices, order.bundle
        more = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}
        options = {
            "num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0), "resources": more, "max_restarts": 0,
            "max_concurrency": CALLS, "runtime_env": {"env_vars": _of_actors()},
        }  # fmt: skip
        actor: Any = ray.remote(NodeRanks)
        self.actors: list[Any] = [
            actor.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, index), **options).remote(
                index * devices, devices, count * devices, REPORT_S
            )
            for index in range(count)
        ]
        self.addresses = _addresses(group, count)

    def start(self, variables: Mapping[str, str]) -> None:
        """Start the ranks. LostError where an actor does not come up."""
        import ray
        from ray.exceptions import RayError

        order = self.order
        try:
            meet = ray.get(self.actors[0].meeting_point.remote(self.addresses[0]), timeout=START_S)
            calls = [
                actor.start.remote(list(order.command), meet, dict(variables), self._outputs(index), str(Path.cwd()))
                for index, actor in enumerate(self.actors)
            ]
            ray.get(calls, timeout=START_S)
        except RayError as error:
            raise LostError(f"the actors did not start: {_reason(error)}") from error

    def _outputs(self, index: int) -> list[str]:
        """Where the ranks of a node write: rank 0 beside the driver, the others where every launch has them."""
        first = index * self.order.devices
        logs = [self.order.run_dir / "logs" / f"rank-{first + local}.log" for local in range(self.order.devices)]
        return [str(log if first + local else self.order.output) for local, log in enumerate(logs)]

    def watch(self, stopped: Callable[[], bool]) -> list[Ended]:
        """How each rank ended. Asks all to save and leave once `stopped`; waits no longer than it has to.

        After the first failure the others get LEAVE_S, after a request to stop the grace of the order. `code` is None
        for those that are left then, and for those whose actor is gone.
        """
        import ray

        waiting = {actor.wait.remote(): index for index, actor in enumerate(self.actors)}
        endings: list[Ended] = []
        deadline, asked = float("inf"), False
        while waiting and time.monotonic() < deadline:
            for ref in ray.wait(list(waiting), num_returns=1, timeout=POLL_S)[0]:
                endings += self._ended(ref, waiting.pop(ref))
            if stopped() and not asked:
                asked, deadline = True, min(deadline, time.monotonic() + self.order.grace_s)
                for index in waiting.values():
                    self.actors[index].ask.remote()
            if any(one["code"] != 0 for one in endings):
                deadline = min(deadline, time.monotonic() + LEAVE_S)
        for index in waiting.values():
            endings += [stayed(rank) for rank in self._ranks(index)]
        return endings

    def _ended(self, ref: Any, index: int) -> list[Ended]:
        import ray
        from ray.exceptions import RayError

        try:
            return list(ray.get(ref))
        except RayError as error:
            why = f"node {self.addresses[index]} or its actor is gone: {_reason(error)}"
            return [lost(rank, why) for rank in self._ranks(index)]

    def _ranks(self, index: int) -> range:
        """Those of a node."""
        return range(index * self.order.devices, (index + 1) * self.order.devices)

    def close(self) -> None:
        """End what is left, and give the nodes back."""
        import ray
        from ray.exceptions import RayError
        from ray.util import remove_placement_group

        ends = [actor.end.remote() for actor in self.actors]
        ray.wait(ends, num_returns=len(ends), timeout=KILLED_S + POLL_S)
        for actor in self.actors:
            with suppress(RayError):
                ray.kill(actor)
        with suppress(RayError):
            remove_placement_group(self.group)


def form(order: Order, count: int, wait_s: float, stopped: Callable[[], bool]) -> Gang | None:
    """A gang on `count` nodes; None where they are not to be had in that time, or a stop is asked for."""
    from ray.util import placement_group, remove_placement_group

    group = placement_group([order.bundle] * count, strategy="STRICT_SPREAD")
    deadline = time.monotonic() + wait_s
    while not stopped() and time.monotonic() < deadline:
        if group.wait(1):
            return Gang(order, group, count)
    remove_placement_group(group)
    return None


def _of_actors() -> dict[str, str]:
    """The code that they import is the driver's; their ranks outlive them for long enough to save."""
    code = {"PYTHONPATH": os.environ["PYTHONPATH"]} if os.environ.get("PYTHONPATH") else {}
    return {**code, "RAY_kill_child_processes_on_worker_exit": "0"}


def _nodes() -> list[dict[str, Any]]:
    import ray

    nodes: Any = ray.nodes  # Ray leaves it untyped
    return list(nodes())


def _addresses(group: Any, count: int) -> list[str]:
    from ray.util import placement_group_table

    places = placement_group_table(group)["bundles_to_node_id"]
    names = {node["NodeID"]: str(node["NodeManagerAddress"]) for node in _nodes()}
    return [names.get(places[index], "?") for index in range(count)]


def _reason(error: Exception) -> str:
    """What went wrong in an actor, or with it, in one line."""
    inner = getattr(error, "cause", None)
    return str(f"{type(inner).__name__}: {inner}" if inner else error).strip().partition("\n")[0]
