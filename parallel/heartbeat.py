"""Signs of life of every rank, and from them the answer to the question who is at fault when all wait.

Each rank keeps where it is (step, section) in memory; a thread of its own writes that to the store a few times a
second, so the training thread never waits for it. A collective that fails or times out says only that somebody is
missing. The survivors then read all signs of life twice: a rank that wrote nothing in between is dead, stopped or
cut off; else the one that is furthest behind is where the others wait for it. The first verdict goes to the store
and holds for all. Every rank's thread looks there too: where the verdict is that ranks live and hang, each writes its
own stack to standard error, and a rank whose training thread does not leave is ended by it. The thread also begins
the inquiry itself when a section takes longer than the timeout, for NCCL tells Python of none but ends the process, or
longer than the steps before allow (`parallel/deadline.py`). That a process alone is held to as well.
"""

import faulthandler
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch.distributed as dist

from parallel.deadline import Deadline
from parallel.failure import RankError, report_of

VERDICT = "verdict"
SILENCE_S = 3.0  # a thread that has not come to write in this time is not there
ANSWER_S = 15.0  # of the store, with an inquiry
LEAVE_S = 5.0  # what the training thread has to come to the verdict by itself
# What gloo, which has no type of error of its own, says when another rank does not answer.
LOST = ("closed by peer", "reset by peer", "timed out", "timeout", "broken pipe", "pair closure", "connection refused")


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


def diagnose(before: Sequence[Beat], after: Sequence[Beat], hanging_s: float) -> tuple[int | None, str]:
    """The rank at fault and what to say of it, from two readings of every rank; None where none can be named.

    Only a rank that has been in its section for `hanging_s` may be blamed for being behind.
    """
    silent = [rank for rank, beat in enumerate(after) if beat.sent == before[rank].sent]
    if silent:
        rank = min(silent, key=lambda r: after[r][:2])
        rest = f"; the same is true of ranks {_words(r for r in silent if r != rank)}" if len(silent) > 1 else ""
        return rank, f"gives no sign of life, it was last in {after[rank].place}: dead, stopped or cut off{rest}"
    places = [beat[:2] for beat in after]
    late = [rank for rank, place in enumerate(places) if place == min(places)]
    beat = after[late[0]]
    if len(late) < len(after) and beat.age_s >= hanging_s:
        waiting = after[max(range(len(after)), key=lambda r: places[r])]
        more = f", like ranks {_words(late[1:])}" if len(late) > 1 else ""
        return late[0], f"has been in {beat.place} for {beat.age_s:.0f} s{more}; the others wait in {waiting.place}"
    longest = max(b.age_s for b in after)
    return None, (
        f"all ranks live and none hangs behind the others; the furthest back is in {beat.place}, the longest "
        f"in a section {longest:.0f} s: not all of them call the same collectives, or the network between them is gone"
    )


def _plain(error: object) -> str:
    """What gloo says, without the place in its source and what it advises."""
    return re.sub(r"^\[\S*\] ", "", str(error).strip()).partition(". ")[0]


def _words(ranks: Iterable[int]) -> str:
    return " ".join(map(str, ranks))


def is_lost(error: BaseException) -> bool:
    """Whether an error of torch.distributed says that another rank does not answer, whatever the reason is there."""
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and any(word in str(error).lower() for word in LOST)
    )


class Verdict(NamedTuple):
    """What some rank has declared; `hangs` where all ranks live, so that their stacks say more."""

    rank: int | None
    message: str
    hangs: bool = False

    @property
    def error(self) -> RankError:
        return RankError(self.rank, self.message)


def read_verdict(store: dist.Store) -> Verdict:
    """The verdict that some rank has declared."""
    return Verdict(*json.loads(store.get(VERDICT)))


class Heartbeat:
    """The signs of life of this rank, and the verdict over all. With one rank there is only the deadline.

    `store` must be a connection of its own: waiting clients of a TCPStore block one another. `end` is called on this
    rank's thread with the verdict when the training thread hangs, and must end the process. `host` is the rank that
    the store ends with, None where it is none.
    """

    def __init__(
        self, store: dist.Store | None, rank: int, world: int, timeout_s: float,
        end: Callable[[RankError], None] | None = None, deadline: Deadline | None = None, host: int | None = None,
    ):  # fmt: skip
        self.host = host
        self.store, self.rank, self.world, self.timeout_s, self.end = store, rank, world, timeout_s, end
        self.deadline = deadline or Deadline(0.0, 0.0, timeout_s)
        self.interval_s = min(max(0.25, world / 2048), timeout_s / 10)  # the store takes some thousand words a second
        self._step, self._number, self._section, self._since, self._sent = 0, 0, "start", time.monotonic(), 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tend, name="heartbeat", daemon=True)

    def beat(self, step: int, section: str) -> None:
        """This rank begins a section. Every rank goes through the same sections of a step in the same order."""
        self._number = self._number + 1 if step == self._step else 0
        self._step, self._section, self._since = step, section, time.monotonic()
        self.deadline.enter(section)

    def start(self) -> None:
        """Begin to write, and to watch the time."""
        if self.store is not None:
            self._send(self.store)
        if self.store is not None or self.deadline.factor:
            self._thread.start()

    def stop(self) -> None:
        """The training thread is on its way out: nothing is left to watch."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(LEAVE_S)

    def explain(self, error: BaseException) -> BaseException:
        """What to raise in place of an error: of a failed collective the verdict; others are told of this rank's own.

        Takes up to SILENCE_S where a verdict must be found, and ANSWER_S where the store is out of reach: a word to it
        has no timeout once the network is cut, so a thread of its own waits for the answer.
        """
        if self.store is None:
            return error
        found: list[BaseException] = []
        store = self.store
        asking = threading.Thread(target=lambda: found.append(self._explained(store, error)), daemon=True)
        asking.start()
        asking.join(ANSWER_S)
        if found:
            return found[0]
        if not is_lost(error):
            return error
        return RankError(None, f"{error}; and the store, which would know why, does not answer in {ANSWER_S:g} s")

    def _explained(self, store: dist.Store, error: BaseException) -> BaseException:
        try:
            if is_lost(error):
                return (self.verdict(store) or self._inquire(store, str(error))).error
            report = report_of(error, self.rank)
            self._declare(store, Verdict(report.rank, report.message))
        except RuntimeError as lost:
            if is_lost(error) and self.host is not None:
                return RankError(self.host, f"is gone, and with it the store, which would know more ({_plain(error)})")
            if is_lost(error):
                return RankError(None, f"{error}; and the store, which would know why, is gone too: {lost}")
        return error

    def verdict(self, store: dist.Store) -> Verdict | None:
        """What has been found out, by whichever rank."""
        return read_verdict(store) if store.check([VERDICT]) else None

    def read(self, store: dist.Store) -> list[Beat]:
        """The last sign of life of every rank."""
        keys = [f"beat/{rank}" for rank in range(self.world)]
        return [Beat(*json.loads(store.get(key))) if store.check([key]) else Beat() for key in keys]

    def _send(self, store: dist.Store) -> None:
        self._sent += 1
        beat = Beat(self._step, self._number, self._section, time.monotonic() - self._since, self._sent)
        store.set(f"beat/{self.rank}", json.dumps(beat))

    def _declare(self, store: dist.Store, verdict: Verdict) -> Verdict:
        """The first to declare decides."""
        return Verdict(*json.loads(store.compare_set(VERDICT, "", json.dumps(verdict))))

    def _inquire(self, store: dist.Store, error: str) -> Verdict:
        found = self._ask(store, self.timeout_s / 2)
        return self._declare(store, found._replace(message=f"{found.message} ({_plain(error)})"))

    def _ask(self, store: dist.Store, hanging_s: float) -> Verdict:
        """Read twice, until every rank has written again or is silent, and judge."""
        before = after = self.read(store)
        deadline = time.monotonic() + max(SILENCE_S, 3 * self.interval_s)
        while any(b.sent == a.sent for b, a in zip(before, after, strict=True)) and time.monotonic() < deadline:
            time.sleep(self.interval_s)
            after = self.read(store)
        rank, message = diagnose(before, after, hanging_s)
        silent = any(b.sent == a.sent for b, a in zip(before, after, strict=True))
        return Verdict(rank, message, hangs=not silent)

    def _tend(self) -> None:
        """The thread."""
        inquiry: threading.Thread | None = None
        looked = time.monotonic()
        while not self._over.wait(self.interval_s):
            now = time.monotonic()
            if now - looked > SILENCE_S:  # the process was stopped as a whole, or starved: no section is at fault
                self.deadline.excuse(now - looked)
            looked = now
            exceeded = self.deadline.exceeded()
            if self.store is None:
                if exceeded:
                    self._obey(self._alone(*exceeded))
                    return
                continue
            # Where the store's host is gone nothing can be said, and the collectives decide.
            with suppress(RuntimeError):
                self._send(self.store)
                verdict = self.verdict(self.store)
                if verdict is not None:
                    self._obey(verdict)
                    return
            late = exceeded is not None or now - self._since > self.timeout_s
            if late and (inquiry is None or not inquiry.is_alive()):
                inquiry = threading.Thread(target=self._suspect, args=(exceeded,), daemon=True)
                inquiry.start()

    def _alone(self, age_s: float, limit_s: float) -> Verdict:
        place = Beat(self._step, self._number, self._section).place
        return Verdict(None, f"{place} hangs: {age_s:.0f} s, and {self._allowed(limit_s)}", hangs=True)

    def _allowed(self, limit_s: float) -> str:
        return f"{limit_s:.3g} s are allowed (parallel.hang_factor, hang_floor_s)"

    def _suspect(self, exceeded: tuple[float, float] | None) -> None:
        """Look for who hangs. Only a deadline that the steps before have set is enough where nobody is behind."""
        assert self.store is not None
        with suppress(RuntimeError):
            found = self._ask(self.store, (exceeded[1] if exceeded else self.timeout_s) / 2)
            if exceeded and self.deadline.exceeded():
                found = found._replace(message=f"{found.message} ({self._allowed(exceeded[1])})")
            elif found.rank is None:
                return
            self._declare(self.store, found)

    def _obey(self, verdict: Verdict) -> None:
        """Show where this rank is, if ranks hang or it is at fault; end it if its training thread does not leave."""
        if (verdict.hangs or verdict.rank in (self.rank, None)) and not self._over.is_set():
            sys.stderr.write(f"rank {self.rank} is here:\n")
            sys.stderr.flush()
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        if not self._over.wait(LEAVE_S if self.store is not None else 0.0):
            if self.end:
                self.end(verdict.error)
            os._exit(1)
