"""The ranks of one node, as processes: what they know, how they are asked to leave, how they end."""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from launch.node_ranks import NodeRanks

STUB = """
import os, signal, sys, time
from pathlib import Path
from launch.rank import own_place, rank_process

place, fault = own_place(), sys.argv[1]
with rank_process(place, Path("logs")):
    came = []
    signal.signal(signal.SIGTERM, lambda *_: came.append(1))
    Path(f"begun-{place.rank}").touch()
    if place.rank == 3 and fault == "raise":
        raise ValueError("no such clip")
    if place.rank == 3 and fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while (fault == "wait" and not came) or (fault == "kill" and place.rank == 2 and "stay" in sys.argv):
        time.sleep(0.02)
    print(f"rank {place.rank} of {place.world}, {place.local_world} here, {os.environ['MASTER_PORT']}", flush=True)
"""


class TestRanks:
    """Ranks 2 and 3 of 4, as the second of two nodes has them."""

    @pytest.fixture
    def ranks(self) -> Iterator[NodeRanks]:
        one = NodeRanks(2, 2, 4, leave_s=2.0)
        yield one
        one.end()
        assert not one.folder.exists()
        assert all(process.poll() is not None for process in one.processes)

    def begin(self, ranks: NodeRanks, folder: Path, *fault: str) -> None:
        (folder / "stub.py").write_text(STUB)
        path = {"PYTHONPATH": str(Path(__file__).parents[3])}
        command = [sys.executable, str(folder / "stub.py"), *fault]
        outputs = [str(folder / f"logs/rank-{rank}.log") for rank in (2, 3)]
        ranks.start(command, ["127.0.0.1", "1234"], path, outputs, str(folder))

    def begun(self, folder: Path) -> None:
        deadline = time.monotonic() + 30
        while len(list(folder.glob("begun-*"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def test_they_know_their_place(self, ranks: NodeRanks, tmp_path: Path):
        self.begin(ranks, tmp_path, "")
        assert [(one["rank"], one["code"]) for one in ranks.wait()] == [(2, 0), (3, 0)]
        assert (tmp_path / "logs/rank-2.log").read_text() == "rank 2 of 4, 2 here, 1234\n"

    def test_the_error_of_one_is_told(self, ranks: NodeRanks, tmp_path: Path):
        self.begin(ranks, tmp_path, "raise")
        well, bad = ranks.wait()
        assert well["code"] == 0
        assert (bad["rank"], bad["fault"], bad["code"], bad["message"]) == (3, 3, 1, "no such clip")
        assert "Traceback" in bad["trace"]
        assert not bad["retry"]

    def test_so_is_the_signal_that_ended_one(self, ranks: NodeRanks, tmp_path: Path):
        self.begin(ranks, tmp_path, "kill")
        assert [one["code"] for one in ranks.wait()] == [0, -9]

    def test_the_others_are_asked_to_leave_and_told_of_if_they_do_not(self, ranks: NodeRanks, tmp_path: Path):
        self.begin(ranks, tmp_path, "kill", "stay")
        assert [one["code"] for one in ranks.wait()] == [None, -9]
        assert ranks.came == [signal.SIGTERM]

    def test_they_stop_when_asked(self, ranks: NodeRanks, tmp_path: Path):
        self.begin(ranks, tmp_path, "wait")
        self.begun(tmp_path)
        ranks.ask()
        assert [one["code"] for one in ranks.wait()] == [0, 0]

    def test_who_is_asked_to_stop_starts_none(self, ranks: NodeRanks, tmp_path: Path):
        ranks.ask()
        self.begin(ranks, tmp_path, "wait")
        assert ranks.wait() == []

    def test_they_are_killed_with_what_is_left_of_them(self, ranks: NodeRanks, tmp_path: Path):
        self.begin(ranks, tmp_path, "wait")
        self.begun(tmp_path)
        ranks.end()
        assert [one["code"] for one in ranks.wait()] == [-9, -9]

    def test_a_port_that_is_free(self, ranks: NodeRanks):
        """Rank 0 can listen there, as its store does; until then nobody else is given it."""
        address, port = ranks.meeting_point("127.0.0.1")
        assert address == "127.0.0.1"
        store = dist.TCPStore("127.0.0.1", int(port), is_master=True, wait_for_workers=False)
        store.set("here", "yes")
        with socket.create_connection((address, int(port)), timeout=5):
            assert store.get("here") == b"yes"
