"""A training loop of a few lines, one rank of which fails in a chosen way at step 5: see test_failures."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from launch.rank import own_place, rank_process
from parallel.failure import RankError

FAIL_AT, LAST, TIMEOUT_S = 5, 40, 4.0
DEADLINE = (12, 60.0, 20.0, 1.0)  # of the fault of this name: its step, timeout, factor and floor


def work(environment: dict[str, str], folder: str, fault: str, faulty: int) -> None:
    """The life of one rank, as a process of its own."""
    os.setsid()
    os.environ.update(environment)
    place = own_place()
    assert place is not None
    with Path(folder, f"rank-{place.rank}.err").open("w") as file:
        os.dup2(file.fileno(), 2)
    with rank_process(place, Path(folder)):
        train(Path(folder), fault if place.rank == faulty else "", *(DEADLINE if fault == "deadline" else ()))


def train(
    folder: Path, fault: str, fail_at: int = FAIL_AT, timeout_s: float = TIMEOUT_S, factor: float = 0,
    floor_s: float = 0, last: int = LAST,
) -> None:  # fmt: skip
    import torch
    import torch.distributed as dist

    from parallel.exchange import exchange, together
    from parallel.ranks import start_ranks
    from vidit.train.stop import StoppedError, StopRequest

    with StopRequest() as stop, start_ranks("cpu", timeout_s, factor, floor_s) as ranks:
        weight = torch.ones(4)

        def leave(step: int, why: str) -> None:
            (folder / f"rank-{ranks.rank}.end").write_text(json.dumps({"step": step, "why": why}))

        for step in range(1, last):
            failing = fault if step == fail_at else ""
            ranks.heartbeat.beat(step, "data")
            try:
                stop.check()
                with together():
                    if failing:
                        time.sleep(0.6)  # so that the signs of life have this step
                    fail(failing)
                    ranks.heartbeat.beat(step, "agreement")
            except StoppedError:
                leave(step, "stop")
                return
            except (ValueError, RankError):
                leave(step, "error")
                raise
            ranks.heartbeat.beat(step, "update")
            if failing == "between":
                hang()
            if failing == "raise":
                raise OSError("the disk is gone")
            gradient = torch.full((4,), float("nan") if failing == "nan" else 1e-3)
            local = bool(gradient.isfinite().all())
            dist.all_reduce(gradient)
            if not gradient.isfinite().all():  # on every rank, so every rank asks
                where = [rank for rank, finite in enumerate(exchange(local)) if not finite]
                leave(step, "nan")
                raise RuntimeError(f"step {step} is not finite on ranks {where}")
            weight -= gradient
            if step == FAIL_AT:
                (folder / "begun").touch()
            time.sleep(0.02)


def fail(fault: str) -> None:
    match fault:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang" | "deadline":
            hang()
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "clip":
            raise ValueError("clip 7 cannot be read")
        case "signal":
            os.kill(os.getpid(), signal.SIGUSR1)


def hang() -> None:
    time.sleep(600)
