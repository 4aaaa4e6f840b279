"""The ranks of a run: this process takes its place among them, and leaves with an error that names one of them.

RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT say where it stands, as torchrun sets them.
Without them, or with a world of one, there is no process group and nothing of this costs anything.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from parallel.deadline import Deadline
from parallel.failure import RankError, report_of, write_report
from parallel.heartbeat import LEAVE_S, VERDICT, Heartbeat, read_verdict

WORDS_S = 10.0  # a store that answers at all answers in this time
MEET_S = 120.0  # for slow disks: importing torch is part of it
WORD_S = 1.0  # for one word, which nobody waits for
PART_POLL_S = 0.05
ABORT_S = 30.0  # NCCL ends the process at its timeout: the verdict comes before


@dataclass(frozen=True)
class Ranks:
    """Where this process stands. `store` carries words between the ranks; None where there is one rank only."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    store: dist.Store | None
    heartbeat: Heartbeat


@contextmanager
def start_ranks(
    device_type: str, timeout_s: float, hang_factor: float = 0.0, hang_floor_s: float = 0.0
) -> Iterator[Ranks]:
    """Make the default process group for the block: gloo on CPU, gloo and NCCL on CUDA; None with a single rank.

    A failed or timed-out collective becomes a RankError that names the rank at fault; an error of this rank itself
    is raised as it is, after the others were told. The process group is then left as it is, for to close it would
    wait for ranks that are gone: end the process with os._exit (`launch.rank.rank_process` does).
    A section of a step that takes longer than `hang_factor` median steps, and than `hang_floor_s`, ends the ranks too,
    and a single process likewise; 0 = it may take as long as the collectives wait.
    Raises RankError where not all ranks come within `timeout_s` (at least MEET_S), or the machine has no device for
    this one.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    deadline = Deadline(hang_factor, hang_floor_s, timeout_s)
    if world == 1:
        heartbeat = Heartbeat(None, 0, 1, timeout_s, _end, deadline)
        heartbeat.start()
        try:
            yield Ranks(0, 1, 0, torch.device(device_type), None, heartbeat)
        finally:
            heartbeat.stop()
        return
    patience_s = max(timeout_s, MEET_S)
    store = _connect(rank, world, patience_s)
    words = dist.PrefixStore("words", _connection(store))
    host = None if _agent_holds_store() else 0
    heartbeat = Heartbeat(words, rank, world, timeout_s, _end, deadline, host)
    try:
        device = _take_device(device_type, rank, local_rank)
        wait_for_all(words, rank, world, patience_s)
        heartbeat.start()
        _make_group(store, device, rank, world, timeout_s)
        yield Ranks(rank, world, local_rank, device, words, heartbeat)
    except BaseException as error:
        told = heartbeat.explain(error)
        heartbeat.stop()
        # A word to a store out of reach has no timeout, so a thread of its own waits for that.
        parting = threading.Thread(target=_part, args=(words, rank, world), daemon=True)
        parting.start()
        parting.join(LEAVE_S if rank == 0 else WORD_S)
        if told is error:
            raise
        raise told from error
    heartbeat.stop()
    dist.destroy_process_group()


def _take_device(device_type: str, rank: int, local_rank: int) -> torch.device:
    """The device of this rank, made the current one."""
    if device_type != "cuda":
        return torch.device(device_type)
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise RankError(
            rank, f"is number {local_rank} on its machine, which has {count} CUDA devices; start at most {count} ranks "
            "on each machine, or use train.device=cpu"
        )  # fmt: skip
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _connect(rank: int, world: int, patience_s: float) -> dist.TCPStore:
    """The store at MASTER_ADDR, which rank 0 hosts where torchrun does not."""
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=patience_s)))
    except (RuntimeError, ValueError) as error:
        raise RankError(rank, f"cannot reach the other {world - 1} ranks at {address}: {error}") from error
    assert isinstance(store, dist.TCPStore)
    return store


def _connection(store: dist.TCPStore) -> dist.Store:
    """A client of the same store that waits for nobody else's."""
    return dist.TCPStore(
        store.host, store.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=WORDS_S)
    )


def wait_for_all(words: dist.Store, rank: int, world: int, patience_s: float) -> None:
    """Return when all ranks have come; importing torch alone may take one longer than a step may take later.

    RankError where one failed on its way, or naming those that did not come.
    """
    words.set(f"here/{rank}", "")
    if words.add("here", 1) == world:
        words.set("all here", "")
    deadline = time.monotonic() + patience_s
    while not words.check(["all here"]):
        if words.check([VERDICT]):
            raise read_verdict(words).error
        if time.monotonic() > deadline:
            missing = [other for other in range(world) if not words.check([f"here/{other}"])]
            raise RankError(
                missing[0] if missing else None, f"has not begun after {patience_s:g} s; of {world} ranks these are "
                f"missing: {' '.join(map(str, missing))}. See whether they were started, and what they say"
            )  # fmt: skip
        time.sleep(min(0.1 + world / 10_000, patience_s / 10))


def _agent_holds_store() -> bool:
    """Whether torchrun hosts it, so that it outlives rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _part(words: dist.Store, rank: int, world: int) -> None:
    """Say that this rank needs the store no more. Where it ends with rank 0, that waits for all who can say so."""
    with suppress(RuntimeError):
        words.set(f"left/{rank}", "")
        if rank != 0 or _agent_holds_store():
            return
        verdict = read_verdict(words) if words.check([VERDICT]) else None
        gone = verdict.rank if verdict and not verdict.hangs else None
        others = [f"left/{other}" for other in range(1, world) if other != gone]
        while others and not words.check(others):
            time.sleep(PART_POLL_S)


def _make_group(store: dist.TCPStore, device: torch.device, rank: int, world: int, timeout_s: float) -> None:
    cuda = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=world,
        timeout=timedelta(seconds=timeout_s + (ABORT_S if cuda else 0)), device_id=device if cuda else None,
    )  # fmt: skip


def _end(verdict: RankError) -> None:
    """Leave word and end this process, whatever its training thread is doing."""
    told = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if told:
        write_report(Path(told), report_of(verdict, 0))
    sys.stderr.write(f"vidit: {verdict}\n")
    sys.stderr.flush()
    os._exit(1)
