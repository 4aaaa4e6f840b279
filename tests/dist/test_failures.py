"""A rank that dies, hangs, fails or is told to stop: all ranks end within the timeout, and the message names it.

Real processes with real signals. They are forked from a server that has imported torch, so a case costs its own
timeouts and little more. The store is this process's, as torchrun has it, or rank 0's, as every launch of ours has.
"""

from __future__ import annotations

import json
import multiprocessing
import socket
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from failing_loop import DEADLINE, FAIL_AT, TIMEOUT_S, work

from parallel.failure import Report, read_report
from parallel.heartbeat import LEAVE_S, SILENCE_S

WORLD, FAULTY = 3, 1
END_S = 60.0  # of a case, on a machine that does much else


@pytest.fixture(scope="module")
def context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "parallel.ranks", "parallel.exchange"])
    return context


class Case:
    """The ranks of one case, and what they left."""

    def __init__(self, folder: Path, processes: list[BaseProcess], seconds: float):
        self.folder, self.codes, self.seconds = folder, [p.exitcode for p in processes], seconds

    def report(self, rank: int) -> Report:
        report = read_report(self.folder / f"rank-{rank}.json")
        assert report is not None, f"rank {rank} said nothing; codes {self.codes}"
        return report

    def err(self, rank: int) -> str:
        return (self.folder / f"rank-{rank}.err").read_text()

    def ends(self) -> list[dict[str, Any]]:
        return [json.loads((self.folder / f"rank-{rank}.end").read_text()) for rank in range(WORLD)]


@pytest.fixture
def run(context: Any, tmp_path: Path) -> Iterator[Any]:
    processes: list[BaseProcess] = []

    def start(fault: str, by_rank_0: bool = False, faulty: int = FAULTY) -> Case:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = free_port() if by_rank_0 else store.port
        for rank in range(WORLD):
            environment = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "OMP_NUM_THREADS": "1",
                "LOCAL_WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "TORCHELASTIC_USE_AGENT_STORE": str(not by_rank_0),
                "TORCHELASTIC_ERROR_FILE": str(tmp_path / f"rank-{rank}.json"),
            }  # fmt: skip
            processes.append(context.Process(target=work, args=(environment, str(tmp_path), fault, faulty)))
            processes[-1].start()
        began = time.monotonic()
        for process in sorted(processes, key=lambda p: p is processes[faulty]):
            if fault == "stop" and process is processes[faulty]:
                process.kill()  # as who started it does in the end
            process.join(max(0.1, END_S - (time.monotonic() - began)))
        assert all(p.exitcode is not None for p in processes), f"still running: {[p.exitcode for p in processes]}"
        return Case(tmp_path, processes, time.monotonic() - began)

    yield start
    for process in processes:
        if process.is_alive():
            process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_killed(run: Any) -> None:
    case = run("kill")
    assert case.codes == [1, -9, 1]
    for rank in (0, 2):
        report = case.report(rank)
        assert report.rank == FAULTY
        assert f"gives no sign of life, it was last in section data of step {FAIL_AT}" in report.message
        assert f"vidit: rank {FAULTY}: gives no sign of life" in case.err(rank)
        assert "terminate called" not in case.err(rank)


def test_stopped(run: Any) -> None:
    """By SIGSTOP: its connections stay open, so nobody hears of it before the timeout."""
    case = run("stop")
    assert case.codes == [1, -9, 1]
    for rank in (0, 2):
        assert case.report(rank).rank == FAULTY
        assert f"gives no sign of life, it was last in section data of step {FAIL_AT}" in case.report(rank).message
    assert case.seconds > TIMEOUT_S


def test_hangs(run: Any) -> None:
    """The hanging rank shows where, and leaves without being killed; nobody waits longer than agreed."""
    case = run("hang")
    assert case.codes == [1, 1, 1]
    for rank in range(WORLD):
        report = case.report(rank)
        assert report.rank == FAULTY
        assert f"has been in section data of step {FAIL_AT} for" in report.message
        assert f"the others wait in section agreement of step {FAIL_AT}" in report.message
    assert "rank 1 is here:" in case.err(FAULTY)
    assert "in hang" in case.err(FAULTY), "its stack"
    assert case.seconds > TIMEOUT_S


def test_a_section_takes_far_longer_than_the_steps_before(run: Any) -> None:
    """Long before the timeout: every rank shows where it is, and ends; the one at fault is named with the limit."""
    case = run("deadline")
    assert case.codes == [1, 1, 1]
    step, timeout_s, _, floor_s = DEADLINE
    for rank in range(WORLD):
        assert case.report(rank).rank == FAULTY
        assert f"has been in section data of step {step} for" in case.report(rank).message
        assert f"{floor_s:g} s are allowed" in case.report(rank).message
        assert f"rank {rank} is here:" in case.err(rank)
    assert "in hang" in case.err(FAULTY)
    assert "any_rank" in case.err(0), "where it waits for the others"
    assert case.seconds < timeout_s / 2


def test_hangs_where_the_others_wait(run: Any) -> None:
    """In the same section no rank is behind: none is blamed, and each shows where it is."""
    case = run("between")
    assert case.codes == [1, 1, 1]
    for rank in range(WORLD):
        assert case.report(rank).rank is None
        assert f"the furthest back is in section update of step {FAIL_AT}" in case.report(rank).message
    assert "in hang" in case.err(FAULTY)


def test_raises_alone(run: Any) -> None:
    """An error that is not agreed on: the others fail in a collective, and say why it failed."""
    case = run("raise")
    assert case.codes == [1, 1, 1]
    for rank in range(WORLD):
        assert (case.report(rank).rank, case.report(rank).message) == (FAULTY, "the disk is gone")
    assert "OSError" in case.report(FAULTY).trace


def test_raises_without_torchrun(run: Any) -> None:
    """As SLURM starts ranks: rank 0 hosts the store, and keeps it until the others have read why."""
    case = run("raise", by_rank_0=True)
    assert case.codes == [1, 1, 1]
    for rank in range(WORLD):
        assert (case.report(rank).rank, case.report(rank).message) == (FAULTY, "the disk is gone")


def test_hangs_without_torchrun(run: Any) -> None:
    """The rank at fault lives, and has to read of itself before the store ends."""
    case = run("hang", by_rank_0=True)
    assert case.codes == [1, 1, 1]
    assert [case.report(rank).rank for rank in range(WORLD)] == [FAULTY] * WORLD


def test_rank_0_waits_for_those_only_that_can_leave(run: Any) -> None:
    """One is killed; the other reads from the store of rank 0 who it was, and no longer is waited."""
    case = run("kill", by_rank_0=True)
    assert case.codes == [1, -9, 1]
    assert [case.report(rank).rank for rank in (0, 2)] == [FAULTY, FAULTY]
    assert case.seconds < LEAVE_S + SILENCE_S


def test_rank_0_is_killed_with_the_store(run: Any) -> None:
    """Nothing can be asked any more, and it is named."""
    case = run("kill", by_rank_0=True, faulty=0)
    assert case.codes == [-9, 1, 1]
    for rank in (1, 2):
        assert case.report(rank).rank == 0
        assert case.report(rank).message.startswith("is gone, and with it the store")


def test_not_finite(run: Any) -> None:
    case = run("nan")
    assert case.codes == [1, 1, 1]
    assert case.ends() == [{"step": FAIL_AT, "why": "nan"}] * WORLD
    assert all(f"step {FAIL_AT} is not finite on ranks [1]" in case.report(r).message for r in range(WORLD))


def test_a_clip_fails_on_one_rank(run: Any) -> None:
    """All save the same step and raise the same error."""
    case = run("clip")
    assert case.codes == [1, 1, 1]
    assert case.ends() == [{"step": FAIL_AT, "why": "error"}] * WORLD
    for rank in range(WORLD):
        assert (case.report(rank).rank, case.report(rank).message) == (FAULTY, "clip 7 cannot be read")


def test_one_is_told_to_stop(run: Any) -> None:
    case = run("signal")
    assert case.codes == [0, 0, 0]
    ends = case.ends()
    assert [end["why"] for end in ends] == ["stop"] * WORLD
    assert len({end["step"] for end in ends}) == 1
    assert not list(case.folder.glob("rank-*.json"))
