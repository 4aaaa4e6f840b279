"""Ranks on this machine: a stub command with real signals, then the real `vidit train`."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from launch.local import LEAVE_S
from parallel import checkpoint
from vidit.config import RunConfig
from vidit.train.metrics import read_metrics
from vidit.train.run import run

ROOT = Path(__file__).parents[2]
WAIT_S = 120.0
STUB = """
import os, signal, sys, time
from pathlib import Path
from launch.rank import own_place, rank_process

folder, fault, place = Path(sys.argv[1]), sys.argv[2], own_place()
with rank_process(place, folder / "logs"):
    came = []

    def take(number, _):
        came.append(signal.Signals(number).name)
        if came.count("SIGINT") > 1:
            raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, take)
    (folder / f"pid-{place.rank}").write_text(str(os.getpid()))
    print(f"out of {place.rank} of {place.world}, {os.environ['OMP_NUM_THREADS']} threads", flush=True)
    print(f"err of {place.rank}", file=sys.stderr, flush=True)
    (folder / f"ready-{place.rank}").touch()
    while not (folder / "ready-0").exists():  # a fault comes when there is a rank to be told of it
        time.sleep(0.02)
    if place.rank == 1 and fault == "raise":
        raise ValueError("no such clip")
    if place.rank == 1 and fault == "kill once" and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if place.rank == 1 and fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if place.rank == 1 and fault == "exit":
        os._exit(7)
    deadline = time.monotonic() + 100
    while fault not in ("", "kill once") and (fault == 'busy' or not came) and time.monotonic() < deadline:
        time.sleep(0.02)
    (folder / f"left-{place.rank}").write_text(" ".join(came))
"""
LAUNCHER = """
import sys
from pathlib import Path
from launch import local
from launch.local import run
from launch.restart import Restarts

assert "torch" not in sys.modules
folder, budget, local.LEAVE_S = Path(sys.argv[1]), int(sys.argv[3]), float(sys.argv[4])
restarts = Restarts(budget, folder / "checkpoints")
sys.exit(run([str(folder / "stub.py"), *sys.argv[1:3]], 2, folder / "logs", restarts=restarts))
"""


class Launch:
    """A launch of two stubs in a process of its own."""

    def __init__(self, folder: Path, fault: str, budget: int = 0, leave_s: float = LEAVE_S):
        (folder / "stub.py").write_text(STUB)
        (folder / "tmp").mkdir()
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(folder), fault, str(budget), str(leave_s)],
            cwd=folder, text=True,
            env={**environment, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp")},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def begun(self) -> list[int]:
        """The processes of the ranks, once every one runs."""
        files = [self.folder / f"pid-{rank}" for rank in range(2)]
        wait(lambda: all(file.is_file() and file.read_text() for file in files))
        return [int(file.read_text()) for file in files]

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=WAIT_S)
        assert not list((self.folder / "tmp").glob("vidit-launch-*")), "the folder of the launch is left"
        return self.process.returncode, out, err

    def left(self) -> list[str]:
        return [(self.folder / f"left-{rank}").read_text() for rank in range(2)]


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    started: list[Launch] = []

    def start(fault: str, budget: int = 0, leave_s: float = LEAVE_S) -> Launch:
        started.append(Launch(tmp_path, fault, budget, leave_s))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


def test_output(launch: Callable[..., Launch], tmp_path: Path) -> None:
    """Rank 0 writes where the launcher does, on both streams; the others into their logs."""
    code, out, err = launch("").end()
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert (code, out, err) == (0, f"out of 0 of 2, {share} threads\n", "err of 0\n")
    assert (tmp_path / "logs/rank-1.log").read_text() == f"out of 1 of 2, {share} threads\nerr of 1\n"
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {"rank-1.log"}


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("raise", 1, "no such clip"),
        ("kill", 137, "ended by SIGKILL without a message"),
        ("exit", 7, "ended with exit code 7 without a message"),
    ],
)
def test_a_rank_fails(launch: Callable[..., Launch], tmp_path: Path, fault: str, code: int, message: str) -> None:
    """One message and no banner; the exit code is the rank's; the others are asked to stop."""
    found, _, err = launch(fault).end()
    assert found == code
    assert err == f"err of 0\nvidit: rank 1: {message}\n  {tmp_path}/logs/rank-1.log has more\n"
    assert (tmp_path / "left-0").read_text() == "SIGTERM"
    assert ("Traceback" in (tmp_path / "logs/rank-1.log").read_text()) == (fault == "raise")


def test_a_killed_rank_is_started_again(launch: Callable[..., Launch], tmp_path: Path) -> None:
    """All ranks are, and meet anew; what happened is said once."""
    code, out, err = launch("kill once", budget=1).end()
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert (code, out) == (0, f"out of 0 of 2, {share} threads\n" * 2)
    assert err.splitlines() == [
        "err of 0", "vidit: rank 1: ended by SIGKILL without a message", f"  {tmp_path}/logs/rank-1.log has more",
        "vidit: starting again from the beginning, 1 of launch.max_restarts=1", "err of 0",
    ]  # fmt: skip
    assert (tmp_path / "logs/rank-1.log").read_text().count("err of 1") == 2, "the first log is kept"


def test_what_the_user_wrote_is_not_tried_again(launch: Callable[..., Launch]) -> None:
    code, _, err = launch("raise", budget=3).end()
    assert code == 1
    assert err.count("err of 0") == 1
    assert err.endswith("vidit: no other start: it would fail again\n")


def test_the_budget_ends(launch: Callable[..., Launch]) -> None:
    code, _, err = launch("kill", budget=1).end()
    assert code == 137
    assert err.count("rank 1: ended by SIGKILL") == 2
    assert err.endswith("vidit: no other start: 2 failures since the beginning\n")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_reaches_every_rank(launch: Callable[..., Launch], name: str) -> None:
    one = launch("wait")
    one.begun()
    one.process.send_signal(signal.Signals[name])
    code, _, err = one.end()
    assert (code, err) == (0, "err of 0\n")
    assert one.left() == [name, name]


def test_a_signal_before_the_ranks_begin(launch: Callable[..., Launch]) -> None:
    one = launch("wait")
    wait(lambda: bool(psutil.Process(one.process.pid).children()))
    one.process.send_signal(signal.SIGUSR1)
    assert one.end()[0] == 0
    assert one.left() == ["SIGUSR1", "SIGUSR1"]


def test_ctrl_c_twice(launch: Callable[..., Launch]) -> None:
    """The second one does not wait for what the first one asked for."""
    one = launch("busy")
    one.begun()
    for _ in range(2):
        one.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    code, _, err = one.end()
    assert (code, err) == (130, "err of 0\nvidit: interrupted\n")


def test_usr1_to_every_process(launch: Callable[..., Launch]) -> None:
    """As SLURM sends it to a step."""
    one = launch("wait")
    for process in (one.process.pid, *one.begun()):
        os.kill(process, signal.SIGUSR1)
    assert one.end()[0] == 0
    assert all(came.startswith("SIGUSR1") for came in one.left())


def test_a_killed_launcher_leaves_no_orphan(launch: Callable[..., Launch]) -> None:
    """The ranks ask themselves to stop, though nobody has waited for the dead launcher yet."""
    one = launch("wait")
    pids = one.begun()
    one.process.kill()
    wait(lambda: not any(is_alive(process) for process in pids))
    assert one.left() == ["SIGTERM", "SIGTERM"]


def test_a_rank_that_does_not_leave_is_killed(launch: Callable[..., Launch]) -> None:
    """Ctrl-C twice, and one rank is stopped; it gets its time, of which 3 s show as much as 30."""
    one = launch("busy", leave_s=3.0)
    stopped = one.begun()[1]
    os.kill(stopped, signal.SIGSTOP)
    for _ in range(2):
        asked = time.monotonic()
        one.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert one.end()[::2] == (130, "err of 0\nvidit: interrupted\n")
    assert time.monotonic() - asked >= 3
    assert not is_alive(stopped)
    assert LEAVE_S == 30, "as its documentation says"


class TestTrain:
    """`vidit train ... launch.local=2` on the tiny run."""

    STEPS = 6

    @pytest.fixture(scope="class")
    def config(
        self,
        configure: Callable[..., RunConfig],
        config_file: Callable[[Path, RunConfig], str],
        tmp_path_factory: pytest.TempPathFactory,
    ) -> str:
        return config_file(tmp_path_factory.mktemp("launched"), configure(sample={"prompts": ()}))

    def test_faults_are_listed_once(
        self, vidit: Callable[..., subprocess.CompletedProcess[str]], config: str, tmp_path: Path
    ) -> None:
        done = vidit(
            "train", config, f"run_dir={tmp_path}/run", "launch.local=3", "parallel.tensor=2", "data.height=33"
        )
        assert done.returncode == 1
        assert done.stderr.count("tensor 2 takes 2 ranks, which do not divide the 3") == 1
        assert done.stderr.count("data.height=33") == 1
        assert not (tmp_path / "run").exists()

    def test_a_rank_does_not_launch(
        self, vidit: Callable[..., subprocess.CompletedProcess[str]], config: str, tmp_path: Path
    ) -> None:
        extra = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
        done = vidit("train", config, f"run_dir={tmp_path}/run", "launch.local=2", extra=extra)
        assert done.returncode == 1
        assert "launch.local=2 starts ranks, but this process is already rank 1 of 4" in done.stderr

    def test_it_trains_as_one_process_does(
        self,
        vidit: Callable[..., subprocess.CompletedProcess[str]],
        configure: Callable[..., RunConfig],
        config: str,
        tmp_path: Path,
    ) -> None:
        assert run(configure(tmp_path / "one", sample={"prompts": ()}))
        done = vidit("train", config, f"run_dir={tmp_path}/two", "launch.local=2", "train.micro_batch=1")
        assert (done.returncode, done.stderr) == (0, "")
        one, two = ([r for r in read_metrics(tmp_path / name) if "loss" in r] for name in ("one", "two"))
        assert [row["step"] for row in two] == list(range(1, self.STEPS + 1))
        assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)

    @pytest.mark.parametrize("which", ["launcher", "rank"])
    def test_stop_and_resume(
        self, command: Callable[..., subprocess.Popen[str]], config: str, tmp_path: Path, which: str
    ) -> None:
        """A signal to the launcher, or to one rank only, stops all at one step; the checkpoint is whole."""
        run_dir = tmp_path / "run"
        steps = ("train.steps=400", "train.validate_every=400", "train.checkpoint_every=400")
        process = command("train", config, f"run_dir={run_dir}", "launch.local=2", "train.micro_batch=1", *steps)
        self.wait_for_step(process, run_dir, 3)
        target = process.pid if which == "launcher" else ranks_under(process.pid)[1]
        os.kill(target, signal.SIGUSR1)
        out, err = process.communicate(timeout=WAIT_S)
        assert (process.returncode, err) == (0, "")
        newest = checkpoint.steps(run_dir / "checkpoints")[-1]
        assert 3 <= newest < 400
        assert checkpoint.verify(checkpoint.folder_of(run_dir / "checkpoints", newest))["step"] == newest
        assert f"at step {newest}" in out

    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_rank_is_killed(
        self, command: Callable[..., subprocess.Popen[str]], config: str, tmp_path: Path, rank: int
    ) -> None:
        """Rank 0 too, with which the store goes."""
        run_dir = tmp_path / "run"
        steps = ("train.steps=400", "train.validate_every=400", "train.checkpoint_every=2", "parallel.timeout_s=20")
        process = command("train", config, f"run_dir={run_dir}", "launch.local=2", "train.micro_batch=1", *steps)
        self.wait_for_step(process, run_dir, 5)
        os.kill(ranks_under(process.pid)[rank], signal.SIGKILL)
        _, err = process.communicate(timeout=WAIT_S)
        assert process.returncode == 137
        assert f"vidit: rank {rank}: ended by SIGKILL" in err
        assert "Traceback" not in err
        newest = checkpoint.steps(run_dir / "checkpoints")[-1]
        assert newest >= 4
        assert checkpoint.verify(checkpoint.folder_of(run_dir / "checkpoints", newest))["step"] == newest

    def test_killed_and_resumed_on_more_ranks(
        self,
        command: Callable[..., subprocess.Popen[str]],
        vidit: Callable[..., subprocess.CompletedProcess[str]],
        configure: Callable[..., RunConfig],
        config: str,
        tmp_path: Path,
    ) -> None:
        """The clips that 2 ranks of 2 workers and then 3 of 1 have consumed are those of one process without a stop."""
        given = ("train.global_batch=6", "train.micro_batch=1", "train.checkpoint_every=2")
        killed, whole = tmp_path / "killed", tmp_path / "whole"
        start = ("launch.local=2", "data.num_workers=2", "train.steps=400", "train.validate_every=400")
        process = command("train", config, f"run_dir={killed}", *start, *given)
        self.wait_for_step(process, killed, random.Random(11).randint(3, 9))
        for rank in ranks_under(process.pid):
            os.kill(rank, signal.SIGKILL)
        process.communicate(timeout=WAIT_S)
        steps = checkpoint.steps(killed / "checkpoints")[-1] + 4
        then = ("launch.local=3", "data.num_workers=1", f"train.steps={steps}")
        done = vidit("train", config, f"run_dir={killed}", *then, *given)
        assert (done.returncode, done.stderr) == (0, "")
        train = {"global_batch": 6, "micro_batch": 1, "checkpoint_every": 400, "steps": steps}
        assert run(configure(whole, train=train, sample={"prompts": ()}))
        one, other = ([(r["step"], r["keys"]) for r in read_metrics(f) if "loss" in r] for f in (killed, whole))
        assert one == other

    @staticmethod
    def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
        def reached() -> bool:
            assert process.poll() is None, process.communicate()
            path = run_dir / "metrics.jsonl"
            lines = path.read_text().split("\n")[:-1] if path.is_file() else []
            return any(json.loads(line)["step"] >= step for line in lines)

        wait(reached)


def ranks_under(launcher: int) -> list[int]:
    """Processes of the ranks of a launch, by rank."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        parents.setdefault(parent, []).append(int(path.parent.name))
    by_rank = {}
    for process in parents[launcher]:
        for item in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
            if item.startswith(b"RANK="):
                by_rank[int(item[5:])] = process
    return [by_rank[rank] for rank in sorted(by_rank)]
