"""The ranks of one node, as processes: what they know, how they are asked to leave, how they end."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from launch.node_ranks import PREFIX, STALE_S, NodeRanks
from launch.rank import POLL_S

STUB = """
import os, signal, subprocess, sys, time
from datetime import timedelta
from pathlib import Path
import launch.rank
from launch.rank import own_place, rank_process

place, fault = own_place(), sys.argv[1]
if fault == "waits in C":
    from torch.distributed import TCPStore
with rank_process(place, Path("logs")):
    came = []
    if fault != "waits in C":
        signal.signal(signal.SIGTERM, lambda *_: came.append(1))
    Path(f"begun-{place.rank}").touch()
    if place.rank == 3 and fault == "raise":
        raise ValueError("no such clip")
    if place.rank == 3 and fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "child":
        subprocess.Popen(["sleep", "60"])
    if fault == "waits in C":
        launch.rank.HOLD_S = 0.5
        TCPStore("127.0.0.1", 9, 2, is_master=False, timeout=timedelta(seconds=60))
    if fault == "log full":
        raise ValueError("no such clip")
    while (fault == "wait" and not came) or (fault == "kill" and place.rank == 2 and "stay" in sys.argv):
        time.sleep(0.02)
    print(f"rank {place.rank} of {place.world}, {place.local_world} here, {os.environ['MASTER_PORT']}", flush=True)
"""


def wait_until_gone(group: int) -> None:
    """ProcessLookupError once no process of the group is left."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        os.killpg(group, 0)
        time.sleep(0.02)


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

    def test_children_of_a_killed_rank_go_with_it(self, ranks: NodeRanks, tmp_path: Path):
        """They hold its output, for whose end others may wait."""
        self.begin(ranks, tmp_path, "child")
        self.begun(tmp_path)
        ranks.wait()
        groups = [process.pid for process in ranks.processes]
        ranks.processes[0].returncode = 1  # one that failed, and one that ended well
        ranks.end()
        with pytest.raises(ProcessLookupError):
            wait_until_gone(groups[0])
        os.killpg(groups[1], signal.SIGKILL)

    def test_one_that_waits_in_foreign_code_leaves_when_asked(self, ranks: NodeRanks, tmp_path: Path):
        """Python's own handlers have to wait for the end of it."""
        self.begin(ranks, tmp_path, "waits in C")
        self.begun(tmp_path)
        ranks.ask()
        began = time.monotonic()
        assert [one["code"] for one in ranks.wait()] == [128 + signal.SIGTERM] * 2
        assert time.monotonic() - began < 20

    def test_one_whose_launcher_file_is_swept_away_goes_on(self, ranks: NodeRanks, tmp_path: Path):
        self.begin(ranks, tmp_path, "wait")
        self.begun(tmp_path)
        (ranks.folder / "launcher").unlink()
        time.sleep(5 * POLL_S)
        assert all(process.poll() is None for process in ranks.processes)
        ranks.ask()
        assert [one["code"] for one in ranks.wait()] == [0, 0]

    def test_one_whose_log_cannot_be_written_still_reports(self, ranks: NodeRanks, tmp_path: Path):
        (tmp_path / "logs").mkdir()
        for rank in (2, 3):
            (tmp_path / f"logs/rank-{rank}.log").symlink_to("/dev/full")
        self.begin(ranks, tmp_path, "log full")
        endings = ranks.wait()
        assert [(one["code"], one["message"]) for one in endings] == [(1, "no such clip")] * 2

    def test_variables_of_any_name_come_through(self, ranks: NodeRanks, tmp_path: Path):
        told = (
            "import os, sys\n"
            "sys.exit(os.environ['a.b'] != 'c d' or os.environ['TORCHELASTIC_USE_AGENT_STORE'] == 'True')"
        )
        variables = {"a.b": "c d", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        ranks.start([sys.executable, "-c", told], ["127.0.0.1", "1234"], variables, [None, None])
        assert [one["code"] for one in ranks.wait()] == [0, 0]

    def test_who_is_ended_starts_none(self, ranks: NodeRanks, tmp_path: Path):
        ranks.end()
        self.begin(ranks, tmp_path, "wait")
        assert ranks.processes == []

    def test_what_killed_launchers_left_is_swept(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        stale, fresh = tmp_path / f"{PREFIX}stale", tmp_path / f"{PREFIX}fresh"
        held = NodeRanks(0, 1, 1, leave_s=1.0)
        for folder in (stale, fresh):
            folder.mkdir()
            (folder / "launcher").touch()
        for folder in (stale, held.folder):
            os.utime(folder, (time.time() - 2 * STALE_S,) * 2)
        NodeRanks(0, 1, 1, leave_s=1.0).end()
        assert [stale.exists(), fresh.exists(), held.folder.exists()] == [False, True, True]
        held.end()

    def test_a_port_that_is_free(self, ranks: NodeRanks):
        """Rank 0 can listen there, as its store does; until then nobody else is given it."""
        address, port = ranks.meeting_point("127.0.0.1")
        assert address == "127.0.0.1"
        store = dist.TCPStore("127.0.0.1", int(port), is_master=True, wait_for_workers=False)
        store.set("here", "yes")
        with socket.create_connection((address, int(port)), timeout=5):
            assert store.get("here") == b"yes"
