"""Signs of life of every rank, and from them the answer to the question who is at fault when all wait.

Each rank keeps where it is (step, section) in memory; a thread of its own writes that to the store about once a
second, so the training thread never waits for it. A collective that fails or times out says only that somebody is
missing. The survivors then read all signs of life twice: a rank that wrote nothing in between is dead, stopped or
cut off; else the one that is furthest behind is where the others wait for it. The first verdict goes to the store
and holds for all. Every rank's thread looks there too: the rank at fault writes its own stack to standard error,
and a rank whose training thread hangs is ended by it. The thread also begins the inquiry itself when a section takes
longer than the timeout while others wait elsewhere: NCCL tells Python of no timeout, it ends the process.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch.distributed as dist

from parallel.failure import RankError

VERDICT = "verdict"
LEAVE_S = 5.0  # what the training thread has to come to the verdict by itself
LOUD = ("gloo", "nccl", "processgroup", "connection closed by peer", "connection reset by peer")


class Beat(NamedTuple):
    """Where a rank is: the `number`-th section of its step, since `age_s`; `sent` counts its signs of life."""

    step: int = 0
    number: int = 0
    section: str = "start"
    age_s: float = 0.0
    sent: int = 0

    @property
    def place(self) -> str:
        return f"section {self.section} of step {self.step}"


def diagnose(before: Sequence[Beat], after: Sequence[Beat]) -> tuple[int | None, str]:
    """The rank at fault and what to say of it, from two readings of every rank; None where no rank is behind."""
    silent = [rank for rank, beat in enumerate(after) if beat.sent == before[rank].sent]
    if silent:
        rank = min(silent, key=lambda r: after[r][:2])
        rest = f"; so do ranks {' '.join(map(str, silent))}" if len(silent) > 1 else ""
        return rank, f"gives no sign of life, it was last in {after[rank].place}: dead, stopped or cut off{rest}"
    places = [beat[:2] for beat in after]
    late = [rank for rank, place in enumerate(places) if place == min(places)]
    beat = after[late[0]]
    if len(late) == len(after):
        longest = max(b.age_s for b in after)
        return None, (
            f"all ranks have been in {beat.place} for {longest:.0f} s, none is behind: some of them wait in "
            "collectives that the others do not call, or the network between them is gone"
        )
    waiting = after[max(range(len(after)), key=lambda r: places[r])]
    more = f", like ranks {' '.join(map(str, late[1:]))}" if len(late) > 1 else ""
    return late[0], f"has been in {beat.place} for {beat.age_s:.0f} s{more}; the others wait in {waiting.place}"


def is_collective(error: BaseException) -> bool:
    """Whether an error comes from torch.distributed, and so perhaps from another rank: gloo has no type of its own."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LOUD)
    )


class Heartbeat:
    """The signs of life of this rank, and the verdict over all. With one rank it does nothing.

    `store` must be a connection of its own: waiting clients of a TCPStore block one another. `end` is called on this
    rank's thread with the verdict when the training thread hangs, and must end the process.
    """

    def __init__(
        self, store: dist.Store | None, rank: int, world: int, timeout_s: float,
        end: Callable[[RankError], None] | None = None,
    ):  # fmt: skip
        self.store, self.rank, self.world, self.timeout_s, self.end = store, rank, world, timeout_s, end
        self.interval_s = min(1.0, timeout_s / 10)
        self._step, self._number, self._section, self._since, self._sent = 0, 0, "start", time.monotonic(), 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tend, name="heartbeat", daemon=True)

    def beat(self, step: int, section: str) -> None:
        """This rank begins a section. Every rank goes through the same sections of a step in the same order."""
        if self.store is not None:
            self._number = self._number + 1 if step == self._step else 0
            self._step, self._section, self._since = step, section, time.monotonic()

    def start(self) -> None:
        if self.store is not None:
            self._send(self.store)
            self._thread.start()

    def stop(self) -> None:
        """The training thread is on its way out: nothing is left to watch."""
        self._over.set()

    def explain(self, error: BaseException) -> BaseException:
        """What to raise in place of an error: of a failed collective the verdict; others are told of this rank's own.

        Takes two intervals where a verdict must be found.
        """
        if self.store is None:
            return error
        try:
            if is_collective(error):
                return self.verdict(self.store) or self._inquire(self.store) or error
            text = error.message if isinstance(error, RankError) else f"{type(error).__name__}: {error}"
            self._declare(self.store, getattr(error, "rank", self.rank), text)
        except RuntimeError as lost:
            if is_collective(error):
                return RankError(None, f"{error}; and the store, which would know why, is gone too: {lost}")
        return error

    def verdict(self, store: dist.Store) -> RankError | None:
        """What has been found out, by whichever rank."""
        return RankError(*json.loads(store.get(VERDICT))) if store.check([VERDICT]) else None

    def read(self, store: dist.Store) -> list[Beat]:
        """The last sign of life of every rank."""
        keys = [f"beat/{rank}" for rank in range(self.world)]
        return [Beat(*json.loads(store.get(key))) if store.check([key]) else Beat() for key in keys]

    def _send(self, store: dist.Store) -> None:
        self._sent += 1
        beat = Beat(self._step, self._number, self._section, time.monotonic() - self._since, self._sent)
        store.set(f"beat/{self.rank}", json.dumps(beat))

    def _declare(self, store: dist.Store, rank: int | None, message: str) -> RankError:
        """The first to declare decides."""
        return RankError(*json.loads(store.compare_set(VERDICT, "", json.dumps([rank, message]))))

    def _inquire(self, store: dist.Store, only_if_behind: bool = False) -> RankError | None:
        before = self.read(store)
        time.sleep(2.5 * self.interval_s)
        rank, message = diagnose(before, self.read(store))
        if only_if_behind and rank is None:
            return None
        return self._declare(store, rank, message)

    def _tend(self) -> None:
        """The thread."""
        assert self.store is not None
        inquiry: threading.Thread | None = None
        while not self._over.wait(self.interval_s):
            # Where the store's host is gone nothing can be said, and the collectives decide.
            with suppress(RuntimeError):
                self._send(self.store)
                verdict = self.verdict(self.store)
                if verdict is not None:
                    self._obey(verdict)
                    return
            if time.monotonic() - self._since > self.timeout_s and (inquiry is None or not inquiry.is_alive()):
                inquiry = threading.Thread(target=self._suspect, daemon=True)
                inquiry.start()

    def _suspect(self) -> None:
        assert self.store is not None
        with suppress(RuntimeError):
            self._inquire(self.store, only_if_behind=True)

    def _obey(self, verdict: RankError) -> None:
        """Show where this rank is if it is at fault, and end it if its training thread does not leave."""
        if verdict.rank in (self.rank, None) and not self._over.is_set():
            sys.stderr.write(f"rank {self.rank} is here:\n")
            sys.stderr.flush()
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        if not self._over.wait(LEAVE_S):
            if self.end:
                self.end(verdict)
            os._exit(1)
