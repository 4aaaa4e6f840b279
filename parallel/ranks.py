"""The ranks of a run: this process takes its place among them, and leaves with an error that names one of them.

RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT say where it stands, as torchrun sets them.
Without them, or with a world of one, there is no process group and nothing of this costs anything.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from parallel.failure import RankError, report_of, write_report
from parallel.heartbeat import Heartbeat

WORDS_S = 10.0  # a store that answers at all answers in this time
MEET_S = 120.0  # for slow disks: importing torch is part of it
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
def start_ranks(device_type: str, timeout_s: float) -> Iterator[Ranks]:
    """Make the default process group for the block: gloo on CPU, gloo and NCCL on CUDA; None with a single rank.

    A failed or timed-out collective becomes a RankError that names the rank at fault; an error of this rank itself
    is raised as it is, after the others were told. The process group is then left as it is, for to close it would
    wait for ranks that are gone: end the process with os._exit (`launch.rank.rank_process` does).
    Raises RankError where not all ranks come within `timeout_s` (at least MEET_S), or the machine has no device for
    this one.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if world == 1:
        yield Ranks(0, 1, 0, torch.device(device_type), None, Heartbeat(None, 0, 1, timeout_s))
        return
    device = _take_device(device_type, rank, local_rank)
    store = _meet(device, rank, world, timeout_s)
    heartbeat = Heartbeat(store, rank, world, timeout_s, _end)
    heartbeat.start()
    try:
        yield Ranks(rank, world, local_rank, device, store, heartbeat)
    except BaseException as error:
        told = heartbeat.explain(error)
        heartbeat.stop()
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


def _meet(device: torch.device, rank: int, world: int, timeout_s: float) -> dist.Store:
    """Make the process group; returns a connection to the store for words of our own."""
    cuda = device.type == "cuda"
    patience = timedelta(seconds=max(timeout_s, MEET_S))
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=patience))
        words = dist.PrefixStore("words", _connection(store))
        _wait_for_all(words, rank, world, patience)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", store=dist.PrefixStore("group", store), rank=rank,
            world_size=world, timeout=timedelta(seconds=timeout_s + (ABORT_S if cuda else 0)),
            device_id=device if cuda else None,
        )  # fmt: skip
    except RankError:
        raise
    except (RuntimeError, ValueError) as error:
        raise RankError(rank, f"cannot join the other {world - 1} ranks at {address}: {error}") from error
    return words


def _connection(store: dist.Store) -> dist.Store:
    """A client of the same store that waits for nobody else's."""
    assert isinstance(store, dist.TCPStore)
    return dist.TCPStore(
        store.host, store.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=WORDS_S)
    )


def _wait_for_all(words: dist.Store, rank: int, world: int, patience: timedelta) -> None:
    """RankError, naming who did not come, where not all ranks do: they import for longer than a step may take."""
    keys = [f"here/{other}" for other in range(world)]
    words.set(keys[rank], "")
    try:
        words.wait(keys, patience)
    except RuntimeError as error:
        missing = [other for other, key in enumerate(keys) if not words.check([key])]
        if not missing:
            raise
        raise RankError(
            missing[0], f"has not begun after {patience.total_seconds():g} s; of {world} ranks these are missing: "
            f"{' '.join(map(str, missing))}. See whether they were started, and what they say"
        ) from error  # fmt: skip


def _end(verdict: RankError) -> None:
    """Leave word and end this process, whatever its training thread is doing."""
    told = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if told:
        write_report(Path(told), report_of(verdict, 0))
    sys.stderr.write(f"vidit: {verdict}\n")
    sys.stderr.flush()
    os._exit(1)
