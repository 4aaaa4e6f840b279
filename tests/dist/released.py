"""Tasks of the pool that fail give their groups back.

What a task raises holds on to its frames, and so to the mesh and the groups in them, until the worker has told of it:
after it has looked for what to drop, and never again. Three such tasks, and every worker is started anew.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from benchmarks.rank_pool import Pool


class ReleasingPool(Pool):
    def run(self, world: int, function: Callable[[Any], Any], argument: Any) -> list[Any]:
        return super().run(world, released, (function, argument))


def released(task: tuple[Callable[[Any], Any], Any]) -> Any:
    """The result of the task; RuntimeError with the text of what it raised, and nothing else of that."""
    function, argument = task
    try:
        return function(argument)
    except Exception:
        told = traceback.format_exc()
    raise RuntimeError(told)
