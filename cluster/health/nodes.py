"""What nodes do together: they meet at a store on node 0, compare their clocks, and sum a tensor over all their GPUs.

Only the node at fault may fail, since a job goes on without the nodes that do. So a node that does not come is left
out of the sum, as one that is unfit already; and where the sum over all fails, hangs or is slow, it is tried again in
pairs, each node with both of its neighbours: the node at fault is the one that fails with both. Of two nodes both fail.
"""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from cluster.health.asked import Asked
from cluster.health.exchange import Rank
from cluster.health.finding import Finding, UnfitError, at_most, within

ROOT = Path(__file__).parents[2]
POLL_S = 0.05
SLACK_S = 10.0
ROUNDS = 4  # all, and up to three of pairs
CLOCK = "start chrony or ntpd on this node"
LINK = "look at the links of this node (ibstat, nvidia-smi nvlink -s), then drain it"


def limit_s(asked: Asked) -> float:
    """More than everything here may take together."""
    return asked.arrival_s + ROUNDS * (2 * asked.limit_s + SLACK_S) + 2 * SLACK_S


def nodes(asked: Asked, now: Callable[[], float] = time.time) -> Iterator[Finding]:
    """Who came, how far the clock is off, and whether the sum was right and as quick as the hardware allows."""
    if asked.place.nodes == 1 and asked.gpus < 2:
        yield Finding("ranks that could exchange anything", 1, "nothing to exchange", "")
        return
    meeting = Meeting(asked, now)
    try:
        yield from meeting.arrive()
        yield from meeting.compare_clocks()
        yield from meeting.exchange()
    finally:
        meeting.leave()


class Meeting:
    """One node's part in it. What a node has to say lies in the store under a key with its number."""

    def __init__(self, asked: Asked, now: Callable[[], float]):
        from torch.distributed import TCPStore

        self.asked, self.place, self.now = asked, asked.place, now
        place, limit = self.place, timedelta(seconds=asked.arrival_s)
        try:
            self.store: Any = TCPStore(
                place.address, place.port, None, place.number == 0, timeout=limit, wait_for_workers=False
            )
        except RuntimeError as error:
            raise UnfitError(
                f"{place.address}:{place.port} not reached in {asked.arrival_s:g} s; check the network between this "
                "node and node 0, its firewall, and that node 0 runs this check"
            ) from error
        self.address, self.port = place.address, int(self.store.port)
        self.roster: dict[int, tuple[str, bool]] = {}  # name, and whether it is fit so far
        self.woke = 0.0

    def arrive(self) -> Iterator[Finding]:
        """Node 0 waits for all and says who is there; the others wait for that."""
        place, wait_s = self.place, self.asked.arrival_s
        self.store.set(f"here/{place.number}", json.dumps([place.name, self.asked.is_fit]))
        if place.number == 0:
            there = self._await("here", range(place.nodes), wait_s)
            self.store.set("roster", json.dumps({number: json.loads(text) for number, text in there.items()}))
        else:
            self.store.wait(["roster"], timedelta(seconds=wait_s + SLACK_S))
        self.woke = self.now()  # at the same moment everywhere: the wait ends when the roster is written
        self.roster = {int(number): (name, fit) for number, (name, fit) in json.loads(self.store.get("roster")).items()}
        if place.number not in self.roster:
            raise UnfitError(f"this node came after the others had waited {wait_s:g} s; look at what delays its start")
        absent = [number for number in range(place.nodes) if number not in self.roster]
        if place.number == 0 and len(absent) == place.nodes - 1 > 0:
            raise UnfitError(
                f"none of {len(absent)} other nodes reached {self.address}:{self.port} in {wait_s:g} s; {LINK}"
            )
        missing = f"; absent: {' '.join(map(str, absent))}" if absent else ""
        yield Finding("nodes that came", len(self.roster), f"of {place.nodes}{missing}", "")

    def compare_clocks(self) -> Iterator[Finding]:
        """Seconds between this node's clock and the median of all."""
        others = [number for number in self.roster if number != self.place.number]
        if not others:
            return
        self.store.set(f"time/{self.place.number}", repr(self.woke))
        told = self._await("time", others, SLACK_S)
        if told:
            times = [float(text) for text in told.values()]
            # Of two nodes both differ from the other; of more the median is that of a sound one.
            off = self.woke - statistics.median(times if len(times) == 1 else [*times, self.woke])
            yield at_most("clock off by s", round(abs(off), 3), self.asked.skew_s, CLOCK)

    def exchange(self) -> Iterator[Finding]:
        """The sum over all, then where needed in pairs."""
        members = sorted(number for number, (_, fit) in self.roster.items() if fit)
        if self.place.number not in members or len(members) * max(self.asked.gpus, 1) < 2:
            return
        finding, words = self._round("all", members, members)
        if all(words.values()):
            yield finding
            return
        tries: dict[int, list[bool]] = {number: [] for number in members}
        for number, pairs in enumerate(pairings(members)):
            mine = next((pair for pair in pairs if self.place.number in pair), None)
            one, words = self._round(f"pairs{number}", mine or [], [node for pair in pairs for node in pair])
            finding = one if mine and not one.is_fit else finding
            for node, fit in words.items():
                tries[node].append(fit)
        sick = [number for number in members if not any(tries[number])]
        if self.place.number in sick:
            text = f"failed with all {len(members)} nodes and with each neighbour"
            yield Finding(f"all-reduce {text}:", f"{finding.what} {finding.value}", finding.limit, LINK, False)
            return
        names = " ".join(self.roster[number][0] for number in sick) or "no single node"
        yield Finding("all-reduce in pairs", "right", f"not over all: {names} at fault", "")

    def leave(self) -> None:
        """Node 0 holds the store, and goes last."""
        with suppress(RuntimeError):
            self.store.set(f"left/{self.place.number}", "")
            if self.place.number == 0:
                self._await("left", self.roster, ROUNDS * (2 * self.asked.limit_s + SLACK_S))

    def _await(self, what: str, numbers: Any, seconds: float) -> dict[int, str]:
        """What the nodes have said by then, by number."""
        deadline, found = time.monotonic() + seconds, dict[int, str]()
        while True:
            for number in (n for n in numbers if n not in found):
                if self.store.check([f"{what}/{number}"]):
                    found[number] = self.store.get(f"{what}/{number}").decode()
            if len(found) == len(numbers) or time.monotonic() > deadline:
                return found
            time.sleep(POLL_S)

    def _round(self, tag: str, group: Sequence[int], everyone: Sequence[int]) -> tuple[Finding, dict[int, bool]]:
        """This node's finding with its group, and for each node whether its own was good."""
        finding = Finding("all-reduce", "not asked", "", "")
        if group:
            finding = self._all_reduce(f"{tag}-{group[0]}", group)
            self.store.set(f"{tag}/{self.place.number}", "1" if finding.is_fit else "0")
        told = self._await(tag, everyone, 2 * self.asked.limit_s + SLACK_S)
        return finding, {number: told.get(number) == "1" for number in everyone}

    def _all_reduce(self, tag: str, group: Sequence[int]) -> Finding:
        """One process for each GPU of this node."""
        asked, count = self.asked, max(self.asked.gpus, 1)
        first, world = group.index(self.place.number) * count, len(group) * count
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        ranks = [
            Rank(self.address, self.port, tag, first + number, world, number if asked.gpus else None, asked.limit_s)
            for number in range(count)
        ]
        running = [
            subprocess.Popen(rank.argv(), env={**os.environ, "PYTHONPATH": path}, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for rank in ranks
        ]  # fmt: skip
        deadline = time.monotonic() + 2 * asked.limit_s
        told = [_answer(process, deadline) for process in running]
        bad = next((text for _, text in told if text), None)
        if bad:
            return Finding(f"all-reduce over {world} ranks", bad, "must be right", LINK, False)
        return within("all-reduce bytes/s", min(rate for rate, _ in told), asked.band("all_reduce_bytes_s"), LINK)


def _answer(process: "subprocess.Popen[str]", deadline: float) -> tuple[float, str]:
    """Bytes a second, or what is wrong."""
    try:
        out, errors = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        return 0.0, "hangs"
    if process.returncode or not out.strip():
        last = errors.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        return 0.0, last[0][:300]
    facts = json.loads(out.strip().splitlines()[-1])
    return facts["rate"], f"{facts['wrong']} wrong sums" if facts["wrong"] else ""


def pairings(members: Sequence[int]) -> list[list[list[int]]]:
    """Rounds of pairs, in which each node meets both of its neighbours on a ring; of an odd number one sits out."""
    count = len(members)
    if count == 1:
        return [[[members[0]]]]
    rounds = []
    for shift in range(2 + count % 2):
        ring = [members[(at + shift) % count] for at in range(count)]
        rounds.append([ring[at : at + 2] for at in range(0, count - 1, 2)])
    return rounds
