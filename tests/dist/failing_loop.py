"""A training loop of a few lines, one rank of which fails in a chosen way at step 5: see test_failures."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from launch.rank import own_place, rank_process

FAIL_AT, LAST, TIMEOUT_S = 5, 40, 4.0


def work(environment: dict[str, str], folder: str, fault: str, faulty: int) -> None:
    """The life of one rank, as a process of its own."""
    os.setsid()
    os.environ.update(environment)
    place = own_place()
    assert place is not None
    with Path(folder, f"rank-{place.rank}.err").open("w") as file:
        os.dup2(file.fileno(), 2)
    with rank_process(place, Path(folder)):
        train(Path(folder), fault if place.rank == faulty else "")


def train(folder: Path, fault: str) -> None:
    import torch
    import torch.distributed as dist

    from parallel.agree import Agreement
    from parallel.ranks import start_ranks
    from vidit.train.stop import StopRequest

    with StopRequest() as stop, start_ranks("cpu", TIMEOUT_S) as ranks:
        agree, weight = Agreement(ranks, ("data",)), torch.ones(4)

        def leave(step: int, why: str) -> None:
            (folder / f"rank-{ranks.rank}.end").write_text(json.dumps({"step": step, "why": why}))

        for step in range(1, LAST):
            ranks.heartbeat.beat(step, "data")
            error: BaseException | None = None
            started = time.perf_counter()
            if fault and step == FAIL_AT:
                time.sleep(0.6)  # so that the signs of life have this step
                try:
                    fail(fault)
                except LookupError as its:
                    error = ValueError(str(its))
            verdict = agree.step(True, stop.signal is not None, error, {"data": time.perf_counter() - started})
            if verdict.error:
                leave(step, "error")
                raise verdict.error
            if verdict.stop:
                leave(step, "stop")
                return
            if step == FAIL_AT:
                (folder / f"rank-{ranks.rank}.slow").write_text(json.dumps([verdict.slowest_rank, verdict.mean_s]))
            ranks.heartbeat.beat(step, "update")
            if fault == "miscounts" and step == FAIL_AT:
                agree.calls += 1
            if fault == "between" and step == FAIL_AT:
                hang()
            gradient = torch.full((4,), float("nan") if fault == "nan" and step == FAIL_AT else 1e-3)
            local = bool(gradient.isfinite().all())
            dist.all_reduce(gradient)
            if not gradient.isfinite().all():  # on every rank, so every rank asks
                where = agree.step(local, False, None, {}).nonfinite_ranks
                leave(step, "nan")
                raise RuntimeError(f"step {step} is not finite on ranks {where}")
            weight -= gradient
            time.sleep(0.02)


def fail(fault: str) -> None:
    match fault:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            hang()
        case "raise":
            raise OSError("the disk is gone")
        case "clip":
            raise LookupError("clip 7 cannot be read")
        case "signal":
            os.kill(os.getpid(), signal.SIGUSR1)


def hang() -> None:
    time.sleep(600)
