"""Batch scripts: compared with golden texts for three sites, and run by bash with a fake srun, scontrol and squeue.

After a wanted change of the template: `python -m tests.unit.launch.test_sbatch` writes the golden texts anew.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from launch.job import JobSpec, Task
from launch.sbatch import faults, quoted, render
from launch.site import Health, Site, Slurm, read_site

GOLDEN = Path(__file__).parent / "golden"
AWKWARD = "a 'q\" b;touch pwned;$(touch pwned)`touch pwned` #&|%j\n#SBATCH --nodes=9\ntouch pwned"
SPECS: dict[str, dict[str, Any]] = {
    "dgx_h100": {"nodes": 128, "devices": 8, "minutes": 2880, "options": ("--account=video",)},
    "a100": {"nodes": 2, "devices": 4, "ranks": "node", "tasks": ("train.seed=1", "train.seed=2")},
    "cpu_test": {"nodes": 2, "devices": 1},
}


def spec(site: str = "", **changes: Any) -> JobSpec:
    sets = changes.pop("tasks", ("",))
    tasks = [
        Task(overrides=(words,) if words else (), run_dir=f"/data/it's 100%/run{n}") for n, words in enumerate(sets)
    ]
    given = {"name": "clips", "config": "configs.clips", "tasks": tasks, "site": site, "workdir": "/home/me/vidit"}
    return JobSpec.model_validate({**given, "python": "/env/bin/python", **changes})


def golden(site: str) -> str:
    return render(spec(site, **SPECS[site]), read_site(site), Path("/data/it's 100%/run0/jobs/001"))


@pytest.mark.parametrize("site", SPECS)
def test_golden(site: str) -> None:
    assert golden(site) == (GOLDEN / f"{site}.sh").read_text()


@pytest.mark.parametrize("site", SPECS)
def test_bash_reads_it(site: str) -> None:
    done = subprocess.run(["bash", "-n"], input=golden(site), text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("word", "there"), [("plain-1.0/x", "plain-1.0/x"), ('a "b" \\c #', '"a \\"b\\" \\\\c #"')])
def test_words_of_options(word: str, there: str) -> None:
    assert quoted(word) == there


FAKES = {
    # Runs the command once, as the one rank, and says which words came.
    "srun": 'while [ "${1#--}" != "$1" ]; do echo "$1" >>"$FAKE/flags"; shift; done\nexec "$@"',
    "scontrol": 'echo "$@" >>"$FAKE/asked"\n[ "$1" != requeue ] || kill -KILL $PPID\n[ "$1" != show ] || echo node1',
    "squeue": 'cat "$FAKE/state"',
    "python": 'printf "%s\\0" "$@" >"$FAKE/words"\n. "$FAKE/rank"',
}


class Bash:
    """A script under bash, with SLURM's commands replaced."""

    def __init__(self, folder: Path):
        self.folder, self.fake = folder, folder / "fake"
        self.fake.mkdir()
        for name, body in FAKES.items():
            (self.fake / name).write_text(f"#!/bin/bash\n{body}\n")
            (self.fake / name).chmod(0o755)
        self.run_dir, self.job = folder / "run", folder / "run/jobs/001"
        self.job.mkdir(parents=True)
        self.say("", state="RUNNING")

    def say(self, rank: str, state: str = "RUNNING") -> None:
        """What the rank does, as bash, and what squeue says."""
        (self.fake / "rank").write_text(rank)
        (self.fake / "state").write_text(state)

    def start(self, site: Site, restart: int = 0, **changes: Any) -> subprocess.Popen[str]:
        given = {"tasks": (), "workdir": str(self.folder), "python": str(self.fake / "python"), **changes}
        overrides = given.pop("overrides", ())
        job = spec("there", **{k: v for k, v in given.items() if k != "tasks"}).model_copy(
            update={"tasks": (Task(overrides=overrides, run_dir=str(self.run_dir)),)}
        )
        (self.job / "job.sh").write_text(render(job, site, self.job))
        slurm = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restart), "SLURM_JOB_NODELIST": "node1",
                 "SLURMD_NODENAME": "node1", "FAKE": str(self.fake)}  # fmt: skip
        return subprocess.Popen(
            ["bash", str(self.job / "job.sh")], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, **slurm, "PATH": f"{self.fake}:{os.environ['PATH']}"}, cwd=self.folder,
        )  # fmt: skip

    def finish(self, site: Site = Site(), **changes: Any) -> tuple[int, str]:  # noqa: B008, frozen
        process = self.start(site, **changes)
        out, _ = process.communicate(timeout=30)
        return process.returncode, out

    def asked(self) -> list[str]:
        """What scontrol was asked to change."""
        path = self.fake / "asked"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [line for line in lines if not line.startswith(("show", "-o"))]

    def marker(self, done: bool, attempt: str = "$VIDIT_ATTEMPT") -> str:
        text = f'{{\\"attempt\\": \\"{attempt}\\", \\"done\\": {str(done).lower()}, \\"step\\": 3, \\"signal\\": null}}'
        return f'echo "{text}" >{shlex.quote(str(self.run_dir / "stopped.json"))}\n'


@pytest.fixture
def bash(tmp_path: Path) -> Bash:
    return Bash(tmp_path)


def test_awkward_words_reach_the_command_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "it's; $(touch pwned) #1").mkdir()
    bash = Bash(tmp_path / "it's; $(touch pwned) #1")
    bash.say(bash.marker(done=True))
    code, out = bash.finish(name="x; $(touch pwned)", overrides=(AWKWARD, "a=b"))
    assert (code, out.splitlines()[-1]) == (0, "job 001/7.0 on node1: done")
    words = (bash.fake / "words").read_text().split("\0")[:-1]
    given = [AWKWARD, "a=b", f"run_dir={bash.run_dir}", "launch.local=1"]
    assert words == ["-m", "vidit.cli", "train", "configs.clips", *given]
    assert not list(tmp_path.rglob("pwned"))
    assert not list(Path.cwd().glob("pwned"))


def test_a_run_that_is_done_is_not_started(bash: Bash) -> None:
    """A job later in a chain; the word of another submission does not count."""
    subprocess.run(["bash", "-c", bash.marker(done=True, attempt="001/6.0")], check=True)
    bash.say("exit 5")
    assert bash.finish() == (0, "job 001/7.0 on node1: the run is done already\n")
    subprocess.run(["bash", "-c", bash.marker(done=True, attempt="002/6.0")], check=True)
    assert bash.finish(restarts=0)[0] == 5


def test_the_word_of_another_start_does_not_count(bash: Bash) -> None:
    """A rank that lives on after its node was lost."""
    bash.say(bash.marker(done=True, attempt="002/7.0") + "exit 9")
    code, out = bash.finish(restarts=0)
    assert code == 9
    assert "failed with exit code 9, newest checkpoint none, failures there: 1" in out
    assert bash.asked() == []


@pytest.mark.parametrize(
    ("state", "requeues"), [("RUNNING", True), ("COMPLETING", False), ("CANCELLED", False), ("PREEMPTED", False)]
)
@pytest.mark.parametrize("number", ["USR1", "TERM"])
def test_a_signal_reaches_the_ranks(bash: Bash, state: str, requeues: bool, number: str) -> None:
    """And the job comes back, unless SLURM has already decided about it."""
    ready = shlex.quote(str(bash.fake / "ready"))
    bash.say(f"trap 'stop=1' USR1\ntouch {ready}\nwhile [ -z \"${{stop:-}}\" ]; do sleep 0.02; done\n"
             + bash.marker(done=False) + "exit 0", state)  # fmt: skip
    process = bash.start(Site())
    wait_for(bash.fake / "ready")
    process.send_signal(signal.Signals[f"SIG{number}"])
    out, _ = process.communicate(timeout=30)
    assert bash.asked() == (["requeue 7"] if requeues else [])
    assert process.returncode == (-signal.SIGKILL if requeues else 0), out


def test_a_task_of_an_array_comes_back_alone(bash: Bash, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last task's SLURM_JOB_ID is the number of the whole array."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    bash.say(bash.marker(done=False) + "exit 0")
    bash.finish()
    assert bash.asked() == ["requeue 7_1"]


@pytest.mark.parametrize(("attempt", "ends"), [("$VIDIT_ATTEMPT", True), ("001/6.0", False)])
def test_what_would_fail_again_ends_the_job(bash: Bash, attempt: str, ends: bool) -> None:
    text = f'{{\\"attempt\\": \\"{attempt}\\", \\"retry\\": false, \\"message\\": \\"nan\\"}}'
    bash.say(f'echo "{text}" >{shlex.quote(str(bash.run_dir / "failed.json"))}\nexit 3')
    code, out = bash.finish()
    assert ("failed with exit code 3 of what would come again" in out) == ends
    assert bash.asked() == ([] if ends else ["requeue 7"])
    assert code == 3 or not ends


def test_failures_are_forgiven_while_checkpoints_come(bash: Bash) -> None:
    checkpoints = bash.run_dir / "checkpoints"
    bash.say("exit 3")
    seen = []
    for newest in (1, 1, 2, 2, 2):
        (checkpoints / f"step-{newest:08d}").mkdir(parents=True, exist_ok=True)
        (checkpoints / f"step-{newest + 1:08d}.partial").mkdir(exist_ok=True)
        seen.append(bash.finish(restarts=2)[0])
    assert seen == [-signal.SIGKILL] * 4 + [3]
    assert bash.asked() == ["requeue 7"] * 4


def test_a_node_that_fails_its_check(bash: Bash) -> None:
    site = Site(health=Health(command=("false",)))
    bash.say(f"touch {shlex.quote(str(bash.fake / 'ran'))}")
    (bash.fake / "scontrol").write_text(
        "#!/bin/bash\n"
        'echo "$@" >>"$FAKE/asked"\n[ "$1" != update ] || kill -KILL $PPID\n[ "$1" != show ] || echo node1\n'
        '[ "$1" != -o ] || echo "JobId=7 JobName=x ReqNodeList=(null) ExcNodeList=node5 NodeList=node1"\n'
    )
    bash.finish(site)
    assert bash.asked() == ["requeue 7", "update JobId=7 ExcNodeList=node5,node1"]
    assert not (bash.fake / "ran").exists()


def test_a_check_that_cannot_run_takes_no_node_out(bash: Bash) -> None:
    code, out = bash.finish(Site(health=Health(command=("no-such-program",))))
    assert code == 1
    assert "the check of the nodes cannot be run" in out
    assert bash.asked() == []


def test_a_check_that_always_fails_ends_the_job(bash: Bash) -> None:
    site, asked = Site(health=Health(command=("false",))), ["requeue 7"]
    (bash.fake / "scontrol").write_text(
        '#!/bin/bash\necho "$@" >>"$FAKE/asked"\n[ "$1" != requeue ] || kill -KILL $PPID\n'
        '[ "$1" != show ] || echo node1\n'
        '[ "$1" != -o ] || echo "JobId=7 ExcNodeList=(null) NodeList=node1"\n'
    )
    for restart in range(5):
        assert bash.finish(site, restart=restart)[0] == -signal.SIGKILL
    code, out = bash.finish(site, restart=5)
    assert code == 1
    assert "found node1 unhealthy, the 6th time; is it the check?" in out
    assert bash.asked() == asked * 5


def test_a_site_that_requeues_nothing(bash: Bash) -> None:
    bash.say(bash.marker(done=False))
    code, out = bash.finish(Site(slurm=Slurm(requeue=False)), chain=2)
    assert code == 0
    assert "the next job of the chain goes on" in out
    assert bash.asked() == []


def test_the_meeting_point_and_the_code(bash: Bash) -> None:
    bash.say(f'echo "$MASTER_ADDR $MASTER_PORT $PYTHONPATH $PYTHONSAFEPATH" >"$FAKE/told"\n{bash.marker(done=True)}')
    bash.finish(restart=2)
    assert (bash.fake / "told").read_text() == f"node1 20047 {bash.job}/source:{bash.folder} 1\n"


@pytest.mark.parametrize(
    ("site", "changes", "fault"),
    [
        (Site(devices=4), {"devices": 8}, "--devices=8: a node of site there has 4"),
        (Site(), {"minutes": 5}, "--time=5 minutes is not more than the 300 s"),
        (Site(), {"chain": 2, "tasks": ("a=1", "a=2")}, "--chain=2 goes with one run, and --array has 2"),
        (Site(slurm=Slurm(requeue=False)), {}, "--restarts=2 has no effect: site there requeues nothing"),
        (Site(), {"options": ("--comment=a\nb",)}, "'--comment=a\\nb' holds a line break, which"),
        (Site(), {"workdir": "/a:b"}, "':' is in the path"),
        (Site(), {"workdir": "/a\nb"}, r"'\n' is in the path"),
    ],
)  # fmt: skip
def test_faults(site: Site, changes: dict[str, Any], fault: str) -> None:
    found = list(faults(spec("there", **changes), site))
    assert len(found) == 1
    assert found[0].startswith(fault)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in SPECS:
        (GOLDEN / f"{name}.sh").write_text(golden(name))
